"""What one sequence takes: recurrent states and convolution histories from the start, keys and values per token."""

from __future__ import annotations

from qwen_export.cache_formats import CacheFormat
from qwen_export.graphs.config import FULL, TextConfig


def layer_bytes(config: TextConfig, kind: str, size: int, caches: CacheFormat, context: int) -> int:
    """Of one layer with `context` tokens. `size`: bytes of an element of histories; recurrent states are fp32."""
    if kind == FULL:
        return _token_bytes(config, caches) * context
    return _recurrent_bytes(config, size)


def _token_bytes(config: TextConfig, caches: CacheFormat) -> int:
    """Key and value of one token in one layer."""
    return 2 * config.num_key_value_heads * caches.row_bytes(config.head_dim)


def _recurrent_bytes(config: TextConfig, size: int) -> int:
    state = 4 * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    return state + size * (config.linear_conv_kernel_dim - 1) * config.conv_dim


def state_bytes(config: TextConfig, size: int) -> int:
    """Recurrent states and convolution histories of all layers."""
    return sum(_recurrent_bytes(config, size) for kind in config.layer_types if kind != FULL)


def cache_bytes_per_token(config: TextConfig, caches: CacheFormat, *, head: bool = False) -> int:
    """Keys and values of one token over all attention layers, that of the draft head among them with `head`."""
    layers = sum(kind == FULL for kind in config.layer_types)
    return (layers + head) * _token_bytes(config, caches)
