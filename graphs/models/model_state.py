"""What a decoder carries from call to call, and what each tensor looks like when nothing has been read yet."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_export.cache_formats import CacheFormat
from qwen_export.graphs.config import FULL, TextConfig
from qwen_export.graphs.ops.cache_rows import CACHE_DTYPES

RECURRENT_DTYPE = torch.float32
PENDING = ("pending_qkv", "pending_b", "pending_a")

State = list[dict[str, Tensor]]


def empty_state(
    config: TextConfig,
    batch: int,
    capacity: int,
    dtype: torch.dtype = torch.float32,
    *,
    caches: CacheFormat | None = None,
    pending: int = 0,
    device: str = "cpu",
) -> State:
    """One dict per layer: conv_history [B,K-1,C], recurrent f32[B,Hv,Dk,Dv], pending_qkv [B,P,C], pending_b and pending_a [B,P,Hv] of a
    DeltaNet layer; k_cache and v_cache [B,Hkv,S,W] of an attention layer, by default values of `dtype`. All zero.
    `capacity` is S, `pending` is P."""
    C, Hv = config.conv_dim, config.linear_num_value_heads

    def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.zeros(batch, *shape, dtype=of, device=device)

    def layer(kind: str) -> dict[str, Tensor]:
        if kind == FULL:
            width = config.head_dim if caches is None else caches.width(config.head_dim)
            of = dtype if caches is None else CACHE_DTYPES[caches.name]
            return {name: zeros(config.num_key_value_heads, capacity, width, of=of) for name in ("k_cache", "v_cache")}
        wide = torch.promote_types(dtype, RECURRENT_DTYPE)
        return {
            "conv_history": zeros(config.linear_conv_kernel_dim - 1, C),
            "recurrent": zeros(Hv, config.linear_key_head_dim, config.linear_value_head_dim, of=wide),
            "pending_qkv": zeros(pending, C),
            "pending_b": zeros(pending, Hv),
            "pending_a": zeros(pending, Hv),
        }

    return [layer(kind) for kind in config.layer_types]
