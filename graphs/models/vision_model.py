"""The vision tower: patches of a picture to rows that stand for tokens. Parameter names are those of the checkpoint, without `model.`.

    x = rows W^T + b + positions            a patch is one row; positions are four rows of a table, weighted by where the patch is
    x <- x + attention(norm1(x)); x <- x + mlp(norm2(x))            depth times
    features = merger(norm(x))              four patches of a block, side by side, to one token

(Qwen3.5 reference: Qwen3_5VisionModel.) A call reads slices of one size, which do not see each other: a picture, several pictures of
equal size, or the slices of a video. So there is no mask and no padding. Nothing in the graph depends on height and width: which rows of
the table, with which weights, and the angles of a patch are inputs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qwen_export.graphs.ops.picture_attention_op import picture_attention
from qwen_export.graphs.vision_config import LAYER_NORM_EPS, VisionConfig


class _Mlp(nn.Module):
    """linear_fc2(gelu(linear_fc1(x))); the blocks' GELU is the one with tanh, the merger's the exact one."""

    def __init__(self, width: int, inner: int, out: int, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.linear_fc1 = nn.Linear(width, inner)
        self.linear_fc2 = nn.Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,T,width] -> [B,T,out]."""
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate=self.approximate))


class _Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B,L,d], cos, sin f32[K,M,D/2], L = K*M -> [B,L,d]."""
        return self.proj(picture_attention(self.qkv(x), cos, sin, self.heads))


class _Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.attn = _Attention(config)
        self.mlp = _Mlp(config.hidden_size, config.intermediate_size, config.hidden_size, "tanh")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class _PatchEmbedding(nn.Module):
    """A convolution whose kernel is its stride: one product over the values of a patch. The checkpoint stores [d,3,F,P,P]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.row_width, config.hidden_size)


class _Merger(_Mlp):
    def __init__(self, config: VisionConfig) -> None:
        width = config.merged * config.hidden_size
        super().__init__(width, width, config.out_hidden_size, "none")
        self.norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)


class _Tower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbedding(config)
        self.pos_embed = nn.Embedding(config.grid**2, config.hidden_size)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.merger = _Merger(config)


class VisionModel(nn.Module):
    """K tokens of M patches each, per slice; B slices."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = _Tower(config)

    def forward(self, rows: Tensor, index: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """rows f32[B,K,M,W]; index i64[K,M,4], rows of the table of positions, and their weights f32[K,M,4]; cos, sin f32[K,M,D/2]
        -> features [B,K,H]."""
        x = self.begin(rows, index, weight)
        for block in self.visual.blocks:
            x = block(x, cos, sin)
        return self.end(x)

    def begin(self, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """What the first block reads, [B,K*M,d]."""
        tower = self.visual
        patches = rows.flatten(1, 2).to(tower.patch_embed.proj.weight.dtype)
        # The sum is fp32 at any precision. One row after the other: all four of every patch would be the largest tensor of the tower.
        index, weight = index.flatten(0, 1), weight.flatten(0, 1).unsqueeze(-1)
        positions = tower.pos_embed(index[:, 0]) * weight[:, 0]
        for row in range(1, index.shape[1]):
            positions = positions + tower.pos_embed(index[:, row]) * weight[:, row]
        x: Tensor = tower.patch_embed.proj(patches)
        return x + positions.to(x.dtype)

    def end(self, x: Tensor) -> Tensor:
        """The features, from what the last block gives."""
        merger = self.visual.merger
        merged = merger.norm(x).unflatten(1, (-1, self.config.merged)).flatten(2, 3)
        features: Tensor = merger(merged)
        return features
