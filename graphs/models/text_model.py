"""The text decoder. Parameter names are those of the checkpoint, without its prefix."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qwen_export.graphs.config import FULL, TextConfig
from qwen_export.graphs.models.attention_layer import Attention
from qwen_export.graphs.models.delta_net_layer import DeltaNet
from qwen_export.graphs.models.mlp_layer import Mlp
from qwen_export.graphs.models.model_state import State
from qwen_export.graphs.models.moe_layer import MoeMlp
from qwen_export.graphs.models.norm_layer import ZeroCenteredRmsNorm
from qwen_export.graphs.ops.place_features_op import place_features


class DecoderLayer(nn.Module):
    """x <- x + mixer(norm(x)); x <- x + mlp(norm(x))."""

    def __init__(self, config: TextConfig, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.input_layernorm = ZeroCenteredRmsNorm(config.hidden_size, config.rms_norm_eps)
        if kind == FULL:
            self.self_attn = Attention(config)
        else:
            self.linear_attn = DeltaNet(config)
        self.post_attention_layernorm = ZeroCenteredRmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoeMlp(config) if config.is_moe else Mlp(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        state: dict[str, Tensor],
        cos: Tensor,
        sin: Tensor,
        length: Tensor,
        accepted: Tensor | None = None,
        commit: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`accepted` and `commit` are for DeltaNet layers, `length` for attention layers."""
        h = self.input_layernorm(x)
        if self.kind == FULL:
            mixed, after = self.self_attn(h, state, cos, sin, length)
        else:
            assert accepted is not None and commit is not None
            mixed, after = self.linear_attn(h, state, accepted, commit)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), after


class TextModel(nn.Module):
    """One call reads T new tokens per sequence: a prefill chunk, a decode step or a speculative verify."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, kind) for kind in config.layer_types)
        self.norm = ZeroCenteredRmsNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        length: Tensor,
        accepted: Tensor,
        commit: Tensor,
        logit_rows: Tensor,
        state: State,
        features: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, State]:
        """input_ids i64[B,T]; cos, sin f32[S,R/2], a row per cache slot; length, accepted, commit i64[B]; logit_rows i64[N], which
        of the B*T rows need logits: row t of sequence b is b*T + t; features [K,H], what stands for the tokens of rows `places` i64[K]
        instead of their embeddings -> logits [N,V], hidden [B,T,H] after the final norm, next state."""
        x = self.embed_tokens(input_ids)
        if features is not None:
            x = place_features(x, features, places)
        after: State = []
        for layer, before in zip(self.layers, state, strict=True):
            x, now = layer(x, before, cos, sin, length, accepted, commit)
            after.append(now)
        hidden = self.norm(x)
        wanted = hidden.flatten(0, 1).index_select(0, logit_rows)
        logits = F.linear(wanted, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(wanted)
        return logits, hidden, after
