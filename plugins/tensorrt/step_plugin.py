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
from qwen_export.graphs.passes.context import PassContext
from qwen_export.graphs.quantization.plan import GroupFormat
from qwen_export.graphs.weights.expression import Stacked
from qwen_export.plugins.decompose.emitter import Emitter
from qwen_export.plugins.native.library import find_ptx, ptx_cuda
from qwen_export.plugins.onnxruntime.common import producing_linear, regroup_pending
from qwen_export.plugins.ops.gated_delta_net import gated_delta_net
from qwen_export.plugins.standard.check_standard import OWN
from qwen_export.runtimes.delta_net_plugin import NAMESPACE, OUTPUTS, STEP, VERIFY, VERSION, StepFields, pack_ptx, unpack_ptx
from qwen_export.runtimes.tensorrt_library import numbers

LONGEST = 9
"""Tokens of a call that the kernel takes, kFewTokens of plugins/native/delta_net.cuh."""
_TENSORS = ("conv_weight", "a_log", "dt_bias", "norm", "conv_history", "state")


def one_projection(emit: Emitter, node: ir.Node, context: PassContext) -> ir.Value:
    """qkv | z | a | b [1,T,C+Hv*Dv+2*Hv], one product for each run of parts that the precision plan gives one format: mostly all four, and
    a and b apart where only the large ones are quantised. The matrices are the same in all graphs of a bundle."""
    config = context.config
    given = dict(zip(gated_delta_net.inputs, node.inputs, strict=False))
    parts = {name: producing_linear(given[name]) for name in ("qkv", "z", "a", "b")}
    x, _ = parts["qkv"]

    def format(name: str) -> GroupFormat:
        return GroupFormat() if context.quantization is None else context.quantization.of(*parts[name][1].stored())

    runs = [list(run) for _, run in groupby(parts, key=format)]
    products = [emit.linear(x, Stacked(tuple(parts[name][1] for name in run)), f"{emit.prefix}.in_proj_{'_'.join(run)}") for run in runs]
    for product, run in zip(products, runs, strict=True):
        product.shape = ir.Shape([1, context.static.T, sum(parts[name][1].shape[0] for name in run)])
    packed = products[0] if len(products) == 1 else emit.concat(products, axis=2)
    packed.shape = ir.Shape([1, context.static.T, config.conv_dim + config.value_dim + 2 * config.linear_num_value_heads])
    return packed


def split_projection(
    emit: Emitter, packed: ir.Value, given: dict[str, ir.Value | None], context: PassContext
) -> dict[str, ir.Value | None]:
    """`given` with the parts of `packed` in the place of the four products."""
    config = context.config
    Hv = config.linear_num_value_heads
    qkv, z, a, b = emit("", "Split", [packed, emit.ints(config.conv_dim, config.value_dim, Hv, Hv)], 4, like=packed, axis=2)
    return given | {"qkv": qkv, "z": z, "a": a, "b": b}


def emit_plugin(emit: Emitter, layer: str, packed: ir.Value, node: ir.Node, context: PassContext) -> list[ir.Value]:
    """The node of the plugin; in a verify what stays pending is the whole product. The state is turned, [1,Hv,Dv,Dk]."""
    config, graph = context.config, emit.graph
    given = dict(zip(gated_delta_net.inputs, node.inputs, strict=False))
    kind, transaction = (VERIFY, "verify") if context.static.P else (STEP, "step")
    inputs = [packed, *(given[name] for name in _TENSORS)]
    if context.static.P:
        inputs += [*regroup_pending(graph, layer, {"pending": packed}), given["accepted"], given["commit"]]
    D = config.linear_key_head_dim
    fields = StepFields(
        kernel=f"qwen_delta_net_{transaction}_{D}",
        ptx=_ptx(context.activation),
        tokens=context.static.T,
        pending_rows=context.static.P,
        key_heads=config.linear_num_key_heads,
        value_heads=config.linear_num_value_heads,
        head_size=D,
        eps=struct.unpack("<i", struct.pack("<f", node.attributes.get_float("eps")))[0],
    )
    # `aot` asks the full TensorRT for the kernel in the engine; RTX has no other form of quick-deployable plugins and ignores it.
    attributes = asdict(fields) | {"plugin_namespace": NAMESPACE, "plugin_version": VERSION, "aot": 1}
    y, history, state = emit(NAMESPACE, kind, inputs, OUTPUTS, like=packed, **attributes)
    old_history, old_state = given["conv_history"], given["state"]
    if old_history is None or old_state is None:
        raise TypeError("a DeltaNet layer has no state")
    y.shape = ir.Shape([1, context.static.T, config.value_dim])
    old_state.shape = ir.Shape([1, config.linear_num_value_heads, D, D])
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
            fix="Run plugins/native/build_ptx.sh, which needs nvcc, or build without --plugin.",
        )
    return pack_ptx(path.read_bytes())
