"""The invariants of the graph IR, checked after every pass."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.errors import REPORT, CaptureError
from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from qwen_export.graphs.ops.op_schema import DOMAIN

# Inputs that stay fp32 whatever the precision: exp and softplus overflow in fp16, and the state accumulates over the whole context.
_FP32_INPUTS = {
    (DOMAIN, "gated_delta_net"): [gated_delta_net.inputs.index(name) for name in ("a_log", "dt_bias", "state")],
    ("com.microsoft", "LinearAttentionGate"): [1, 2],
    ("com.microsoft", "LinearAttention"): [3],
    ("com.microsoft", "GatedDeltaNet"): [4, 5, 6, 7, 8],
    ("qwen.native", "DeltaNet"): [2, 3, 6],
    ("qwen.native", "DeltaNetTransaction"): [1, 3, 4, 7, 9],
}
_INTEGERS = (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT4, ir.DataType.INT4)
# A changed choice of experts costs more than the bytes of a router save.
_NEVER_QUANTIZED = (".mlp.gate.", ".mlp.shared_expert_gate.")
_MUTATING = ("copy_", "index_put_", "fill_")


def verify_graph(model: ir.Model, after: str) -> None:
    """Raise CaptureError when `after`, the phase that just ran, left a broken graph."""
    graph = model.graph
    known = {*graph.inputs, *graph.initializers.values()}
    names: set[str] = set()
    for node in graph:
        where = f"after {after}, {node.domain or 'ai.onnx'}.{node.op_type} {node.name or ''}"
        for value in node.inputs:
            if value is not None and value not in known:
                raise CaptureError("a node reads a value that is not made before it", where=where, got=value.name, fix=REPORT)
        if node.op_type.endswith(_MUTATING):
            raise CaptureError("a node writes to its input", where=where, fix=REPORT)
        for index in _FP32_INPUTS.get((node.domain, node.op_type), []):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and value.dtype != ir.DataType.FLOAT:
                raise CaptureError("an input that must be fp32 is not", where=where, got=f"{value.name}: {value.dtype}", fix=REPORT)
        known.update(node.outputs)
    for name, initializer in graph.initializers.items():
        if initializer.dtype in _INTEGERS and any(part in f".{name}" for part in _NEVER_QUANTIZED):
            raise CaptureError("a router or the gate of a shared expert is quantized", where=f"after {after}", got=name, fix=REPORT)
    for value in graph.outputs:
        if value not in known:
            raise CaptureError("a graph output is not made by any node", where=f"after {after}", got=value.name, fix=REPORT)
    for value in [*graph.inputs, *graph.outputs]:
        if not value.name or value.name in names:
            raise CaptureError("graph inputs and outputs have the same name or none", where=f"after {after}", got=value.name, fix=REPORT)
        names.add(value.name)
        if value.dtype is None or value.shape is None:
            raise CaptureError("a graph input or output has no type", where=f"after {after}", got=value.name, fix=REPORT)
