"""The multi-token-prediction head: one decoder layer that drafts the token after the next one, chained over its own output.

For slot i the head reads the embedding of token i+1 and the main model's hidden state of token i and predicts token i+2. To draft
further it reads its own last draft and its own normed output, keeping one KV row per slot. Training and measuring use the parallel form
below: chain i starts at slot i, and its step s sees the main-model rows of slots 0..i and its own rows of steps 1..s.
"""

from __future__ import annotations

from typing import Any

import torch
from layers import DecoderLayer, RMSNorm, rope
from torch import Tensor, nn


class MTPHead(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        hidden, eps = c["hidden_size"], c["rms_norm_eps"]
        self.config = c
        self.pre_fc_norm_embedding = RMSNorm(hidden, eps)
        self.pre_fc_norm_hidden = RMSNorm(hidden, eps)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([DecoderLayer(c, "full_attention")])
        self.norm = RMSNorm(hidden, eps)

    def start_from(self, layer: DecoderLayer, norm: RMSNorm) -> None:
        """Start the head as a copy of the main model's last attention layer that reads the mean of its two inputs."""
        self.layers[0].load_state_dict(layer.state_dict())
        self.norm.load_state_dict(norm.state_dict())
        with torch.no_grad():
            eye = torch.eye(self.fc.out_features, device=self.fc.weight.device)
            self.fc.weight.normal_(0, 0.01).add_(torch.cat((eye, eye), 1), alpha=0.5)

    def chain(
        self, embeddings: list[Tensor], hidden: Tensor, post_norm: bool = True, angles: tuple[Tensor, Tensor] | None = None
    ) -> list[Tensor]:
        """All steps of every chain at once.

        embeddings[s] [B,N,H]: of token i+1+s for chain i; hidden [B,N,H]: main-model state of slot i, after the final norm if
        `post_norm`. Returns the normed output [B,N,H] of each step; with `post_norm` false the next step is fed the un-normed output.
        `angles`: cos and sin of all slots, [B,1,N+steps-1 or more,rotary_dim], where they are not those of a text.
        """
        layer = self.layers[0]
        n, device = hidden.shape[1], hidden.device
        causal = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        own = torch.eye(n, dtype=torch.bool, device=device)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        outputs: list[Tensor] = []
        for step, embedding in enumerate(embeddings):
            x = self.fc(torch.cat((self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)), -1))
            if angles is None:
                cos, sin = rope(torch.arange(step, step + n, device=device), self.config)
            else:
                cos, sin = (one[..., step : step + n, :] for one in angles)
            q, k, v, gate = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
            keys.append(k)
            values.append(v)
            mask = torch.cat([causal] + [own] * step, 1) if step else None
            x = x + layer.self_attn.attend(q, torch.cat(keys, 2), torch.cat(values, 2), gate, mask)
            x, _ = layer.feed_forward(x)
            outputs.append(self.norm(x))
            hidden = outputs[-1] if post_norm else x
        return outputs
