"""The vision tower as a training module; parameter names equal those of the released checkpoints behind `model.visual.`.

Dims: S slices of one size, n patches of a slice in the order of the runtime's `patch_rows`, d width, m^2 patches of a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_export.manifest import VisionSpec
from qwen_export.runtimes.vision.patch_positions import patch_positions


class Attention(nn.Module):
    """Over all patches of a slice, without a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [S,n,d]; cos, sin [n,D/2], each used for both halves of a head."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(width, inner)
        self.linear_fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, inner)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Four neighboring patches to one token, in the decoder's width. Its GELU is the exact one."""

    def __init__(self, width: int, merged: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear_fc1 = nn.Linear(width * merged, width * merged)
        self.linear_fc2 = nn.Linear(width * merged, out)
        self.merged = merged

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).unflatten(1, (-1, self.merged)).flatten(2)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class PatchEmbed(nn.Module):
    """Stored as the convolution that it is in the releases; kernel and stride are equal, so it is one product."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        patch = c["patch_size"]
        self.proj = nn.Conv3d(c["in_channels"], c["hidden_size"], (c["temporal_patch_size"], patch, patch))

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.proj.weight.flatten(1), self.proj.bias)


class VisionTower(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, merged = c["hidden_size"], c["spatial_merge_size"] ** 2
        self.patch_embed = PatchEmbed(c)
        self.pos_embed = nn.Embedding(c["num_position_embeddings"], width)
        self.blocks = nn.ModuleList(Block(width, c["num_heads"], c["intermediate_size"]) for _ in range(c["depth"]))
        self.merger = Merger(width, merged, c["out_hidden_size"])
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                last = name.endswith(("proj.weight", "linear_fc2.weight")) and "blocks" in name
                nn.init.normal_(parameter, 0, 0.02 * ((2 * c["depth"]) ** -0.5 if last else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, levels: Tensor, places: Places) -> Tensor:
        """levels u8[S,n,columns] -> features [S,n/m^2,out]."""
        # What the runtime's `patch_rows` gives for these 256 levels.
        rows = (levels.float() - 127.5) / 127.5
        positions = (self.pos_embed(places.index) * places.weight[..., None]).sum(-2)
        x = self.patch_embed(rows) + positions
        for block in self.blocks:
            x = block(x, places.cos, places.sin)
        return self.merger(x)


class Places:
    """Where the patches of a slice of rows x columns patches are, as the runtime gives it to the tower."""

    def __init__(self, rows: int, columns: int, spec: VisionSpec, device: torch.device) -> None:
        found = [torch.from_numpy(a).to(device).flatten(0, 1) for a in patch_positions(rows, columns, spec).values()]
        self.index, self.weight, self.cos, self.sin = found
