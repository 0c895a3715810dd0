"""gated_delta_net on our own kernel, where calls are short: one launch for everything between the projections.

The kernel is that of ONNX Runtime's plugin (plugins/native/few_tokens.cuh), compiled to PTX. A node carries its kernel with it, so that
`rebuild` needs nothing else, and engines are complete.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby

import onnx_ir as ir

from qwen_export.errors import UnsupportedError
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.weights.expression import Stacked
from qwen_export.plugins.emitter import Emitter
from qwen_export.plugins.native.native_library import PTX_SCRIPT, find_ptx, ptx_cuda
from qwen_export.plugins.rewrite import producing_linear
from qwen_export.runtimes.backends.tensorrt.delta_net_plugin import (
    NAMESPACE,
    OWN,
    RESULTS,
    STEP,
    VERIFY,
    VERSION,
    StepFields,
    pack_ptx,
    unpack_ptx,
)
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import numbers

LONGEST = 9
"""Tokens of a call that the kernel takes, kFewTokens of plugins/native/delta_net.cuh."""
_TENSORS = ("conv_weight", "a_log", "dt_bias", "norm", "conv_history", "state")


def one_projection(emit: Emitter, given: dict[str, ir.Value | None], context: PassContext) -> ir.Value:
    """qkv | z | a | b [1,T,C+Hv*Dv+2*Hv], one product for each run of parts that the precision plan gives one format: mostly all four, and
    a and b apart where only the large ones are quantized. The matrices are the same in all graphs of a bundle."""
    parts = {name: producing_linear(given[name]) for name in ("qkv", "z", "a", "b")}
    x, _ = parts["qkv"]

    def product(names: list[str]) -> ir.Value:
        stacked = Stacked(tuple(parts[name][1] for name in names))
        y = emit.linear(x, stacked, f"{emit.prefix}.in_proj_{'_'.join(names)}")
        y.shape = ir.Shape([1, context.static.T, stacked.shape[0]])
        return y

    products = [product(list(names)) for _, names in groupby(parts, key=lambda name: context.format_of(parts[name][1]))]
    if len(products) == 1:
        return products[0]
    packed = emit.concat(products, axis=2)
    packed.shape = ir.Shape([1, context.static.T, sum(weight.shape[0] for _, weight in parts.values())])
    return packed


def split_projection(emit: Emitter, packed: ir.Value, context: PassContext) -> dict[str, ir.Value]:
    """The four parts again."""
    config = context.config
    Hv = config.linear_num_value_heads
    parts = emit("", "Split", [packed, emit.ints(config.conv_dim, config.value_dim, Hv, Hv)], 4, like=packed, axis=2)
    return dict(zip(("qkv", "z", "a", "b"), parts, strict=True))


def emit_plugin(
    emit: Emitter, packed: ir.Value, pending: list[ir.Value], given: dict[str, ir.Value | None], eps: float, context: PassContext
) -> list[ir.Value]:
    """The node of the plugin: y, conv_history', state'. `pending`: what a verify may replay, like `packed`; else nothing. The state is
    turned, [1,Hv,Dv,Dk]."""
    config, transaction = context.config, [*pending, given["accepted"], given["commit"]] if pending else []
    kind, kernel = (VERIFY, "verify") if pending else (STEP, "step")
    D = config.linear_key_head_dim
    fields = StepFields(
        kernel=f"qwen_delta_net_{kernel}_{D}",
        ptx=_ptx(context.activation),
        tokens=context.static.T,
        pending_rows=context.static.P,
        key_heads=config.linear_num_key_heads,
        value_heads=config.linear_num_value_heads,
        head_size=D,
        eps=struct.unpack("<i", struct.pack("<f", eps))[0],
    )
    # `aot` makes the full TensorRT store the kernel in the engine; RTX has no other form of quick-deployable plugins and ignores it.
    attributes = asdict(fields) | {"plugin_namespace": NAMESPACE, "plugin_version": VERSION, "aot": 1}
    inputs = [packed, *(given[name] for name in _TENSORS), *transaction]
    y, history, state = emit(NAMESPACE, kind, inputs, len(RESULTS), like=packed, **attributes)
    old_history, old_state = given["conv_history"], given["state"]
    if old_history is None or old_state is None:
        raise TypeError("a DeltaNet layer has no state")
    y.shape = ir.Shape([1, context.static.T, fields.width])
    history.shape, state.shape, state.type = old_history.shape, old_state.shape, old_state.type
    return [y, history, state]


def needed_cuda(models: Iterable[ir.Model]) -> str:
    """The CUDA that a driver must serve for the kernels that our nodes carry, "" where there are none."""
    carried = {node.attributes.get_string("ptx") for model in models for node in model.graph if (node.domain, node.op_type) in OWN}
    return max((ptx_cuda(unpack_ptx(ptx)) for ptx in carried), key=numbers, default="")


def _ptx(activation: ir.DataType) -> str:
    path = find_ptx(activation.name.lower())
    if path is None:
        raise UnsupportedError(
            "the plugin's kernel has not been compiled",
            fix=f"Run `sh {PTX_SCRIPT}`, which needs nvcc, or leave out {{plugins}}.",
        )
    return pack_ptx(path.read_bytes())
