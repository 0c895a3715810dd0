"""Rows of attention caches in PyTorch: what the kernels store of keys and values, and what they read back (cache_formats.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_export.cache_formats import FP8_CACHE, INT8_CACHE

_MOST_CODE = 127.0


def stored_rows(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [...,W] of a cache of `dtype` for values [...,D]. Rounds to nearest, ties to even; nothing becomes infinite."""
    if dtype == torch.int8:
        wide = values.float()
        scale = wide.abs().amax(-1, keepdim=True) / _MOST_CODE
        codes = (wide / torch.where(scale == 0, 1.0, scale)).round().clamp(-_MOST_CODE, _MOST_CODE).to(torch.int8)
        factor = scale.contiguous().view(torch.int8)
        return torch.cat([codes, torch.nn.functional.pad(factor, (0, INT8_CACHE.behind - factor.shape[-1]))], dim=-1)
    if dtype in (torch.float8_e4m3fn, torch.float16) and dtype != values.dtype:
        most = torch.finfo(dtype).max
        return values.float().clamp(-most, most).to(dtype)
    return values.to(dtype)


def row_values(rows: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """The values [...,D] that rows stand for, in `dtype`."""
    if rows.dtype == torch.int8:
        factor = rows[..., head_dim : head_dim + 4].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return (rows[..., :head_dim].float() * factor).to(dtype)
    return rows.float().to(dtype) if rows.dtype == torch.float8_e4m3fn else rows.to(dtype)


CACHE_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    INT8_CACHE.name: torch.int8,
    FP8_CACHE.name: torch.float8_e4m3fn,
}
"""The element type of a cache by its format's name."""
