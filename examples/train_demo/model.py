"""One checkpoint as a training module: `model.*` (the text model) and `mtp.*` (the MTP head), names as released.

Exporting is therefore only a cast and a save; `export.py` checks the logits against transformers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from layers import Config, TextModel, rope
from mtp import MTPHead
from torch import Tensor, nn


class Qwen(nn.Module):
    """`model.*` and `mtp.*` of one checkpoint; the head is tied to the embedding."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.model = TextModel(c)
        self.mtp = MTPHead(c)
        depth = 2 * c["num_hidden_layers"]
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and "conv1d" not in name:
                scale = depth**-0.5 if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")) else 1.0
                nn.init.normal_(parameter, 0, 0.02 * scale)

    def hidden(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B,T] -> hidden before and after the final norm [B,T,H], and the mean load-balancing loss."""
        return self.hidden_of(self.model.embed_tokens(ids), *rope(torch.arange(ids.shape[1], device=ids.device), self.config))

    def hidden_of(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same from what stands for the tokens, x [B,T,H], and their angles, [T,rotary_dim] or [B,1,T,rotary_dim]."""
        balance = x.new_zeros(())
        for layer in self.model.layers:
            x, term = layer(x, cos, sin)
            balance = balance + term / len(self.model.layers)
        return x, self.model.norm(x), balance

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)
