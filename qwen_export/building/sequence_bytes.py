"""What one sequence takes: recurrent states and convolution histories from the start, keys and values per token."""

from __future__ import annotations

from qwen_export.graphs.config import FULL, TextConfig


def layer_bytes(config: TextConfig, kind: str, size: int, context: int) -> int:
    """Of one layer with `context` tokens. `size`: bytes of an element of caches and histories; recurrent states are fp32."""
    if kind == FULL:
        return 2 * size * config.num_key_value_heads * config.head_dim * context
    recurrent = 4 * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    return recurrent + size * (config.linear_conv_kernel_dim - 1) * config.conv_dim


def state_bytes(config: TextConfig, size: int) -> int:
    """Recurrent states and convolution histories of all layers."""
    return sum(layer_bytes(config, kind, size, 0) for kind in config.layer_types)


def cache_bytes_per_token(config: TextConfig, size: int, *, head: bool = False) -> int:
    """Keys and values of one token over all attention layers, that of the draft head among them with `head`."""
    layers = sum(kind == FULL for kind in config.layer_types)
    return (layers + head) * layer_bytes(config, FULL, size, 1)
