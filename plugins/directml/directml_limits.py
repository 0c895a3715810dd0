"""What DirectML's kernels demand of a node beyond its type, read from the provider's sources (same commit as operators.json) or seen when
it ran (tests/directml)."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

# OperatorRegistration.cpp: inputs that the provider reads on the host when it compiles the graph.
_CONSTANT_INPUTS = {
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Expand": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "ReduceSum": (1,),
    "ReduceMean": (1,),
    "CumSum": (1,),
    "GroupQueryAttention": (6,),
}


def limit(node: ir.Node) -> str:
    """Why a node that has a kernel would still not run, or would compute another result; "" when it runs."""
    for index in _CONSTANT_INPUTS.get(node.op_type, ()):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and value.const_value is None:
            return f"its input {index} must be a constant"
    check = _CHECKS.get(node.op_type)
    return check(node) if check is not None else ""


def _group_query_attention(node: ir.Node) -> str:
    """DmlOperatorGroupQueryAttention.cpp: with more than one token the number of past tokens is replaced by zero."""
    query = node.inputs[0]
    tokens = query.shape[1] if query is not None and query.shape is not None else None
    if tokens != 1:
        return "with more than one new token the kernel ignores everything read before"
    if node.attributes.get_int("do_rotary", 0):
        return "the kernel does not rotate"
    return "" if node.inputs[1] is not None else "the kernel takes query, key and value separately"


def _matmul_nbits(node: ir.Node) -> str:
    """DmlOperatorMatMulNBits.cpp, QueryMatMulNBits."""
    if node.attributes.get_int("bits", 4) not in (4, 8):
        return "only 4 and 8 bits"
    return "K must be a multiple of the block size" if node.attributes.get_int("K") % node.attributes.get_int("block_size") else ""


def _reshape(node: ir.Node) -> str:
    """Seen with 1.24.4: the session cannot be opened ("Invalid parameter")."""
    sizes = node.inputs[1].const_value if node.inputs[1] is not None else None
    if sizes is None or not node.attributes.get_int("allowzero", 0):
        return ""
    return "with allowzero, no size may be -1" if -1 in sizes.numpy() else ""


def _one_output(node: ir.Node) -> str:
    """DmlOperatorLayerNormalization.cpp, QueryLayerNormalization."""
    return "" if len([value for value in node.outputs if value.name]) == 1 else "only with one output"


_CHECKS: dict[str, Callable[[ir.Node], str]] = {
    "GroupQueryAttention": _group_query_attention,
    "MatMulNBits": _matmul_nbits,
    "Reshape": _reshape,
    "SimplifiedLayerNormalization": _one_output,
    "LayerNormalization": _one_output,
}
