"""The convolution of a prompt over channels instead of tokens: one grouped Conv.

Rows of tokens are shifted and multiplied by each tap, which is ten passes over all of them (`shifted_products`). ONNX Runtime's CPU
provider convolves channel by channel, which needs channels first, and they come so at no cost: a product with the weight on the left is
[C,T]. For targets whose convolution is good at groups of one channel, and calls without pending tokens.
"""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.graphs.weights.expression import Reshaped, add_weight, weight_of
from qwen_export.plugins.decompose.decompose_delta_net import DeltaNetSizes, as_fp32, last_inputs, unit_heads
from qwen_export.plugins.emitter import Emitter


def channel_convolution(
    emit: Emitter, given: dict[str, ir.Value | None], sizes: DeltaNetSizes
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """A Convolution of decompose_delta_net; `qkv` is [1,C,T]."""
    T, Hk, Hv, Dk, Dv, K = sizes.T, sizes.Hk, sizes.Hv, sizes.Dk, sizes.Dv, sizes.K
    C, history = 2 * Hk * Dk + Hv * Dv, given["conv_history"]
    if history is None:
        raise TypeError("gated_delta_net has no history")
    rows = emit.concat([emit.transpose(history, 0, 2, 1), given["qkv"]], axis=2)
    history_after = emit.transpose(last_inputs(emit, rows, given.get("commit"), sizes, axis=2), 0, 2, 1)
    (x,) = emit("", "Conv", [emit.wide(rows), _kernels(emit, given["conv_weight"], C, K)], dtype=ir.DataType.FLOAT, group=C)
    qk, v = emit.split(emit.mul(x, emit.sigmoid(x)), [2 * Hk * Dk, Hv * Dv], axis=1)
    q, k = unit_heads(emit, emit.transpose(emit.reshape(qk, 1, 2 * Hk, Dk, T), 0, 1, 3, 2), sizes)
    return q, k, emit.transpose(emit.reshape(v, 1, Hv, Dv, T), 0, 1, 3, 2), history_after


def _kernels(emit: Emitter, value: ir.Value | None, C: int, K: int) -> ir.Value:
    """The weight as Conv reads it, f32[C,1,K]."""
    weight = weight_of(value)
    if value is None or weight is None:
        raise TypeError("the convolution has no stored weight")
    name = (value.name or "").removesuffix(".view")
    return add_weight(emit.graph, f"{name}.kernels", Reshaped(as_fp32(weight), (C, 1, K)))
