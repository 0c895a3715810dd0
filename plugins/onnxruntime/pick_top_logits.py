"""The largest logits leave the graph beside all of them: choosing a token needs no more almost always, and they are few to copy."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.bundle_contract import LOGITS, TOP_COUNT, TOP_IDS, TOP_LOGITS
from qwen_export.graphs.passes.pass_context import PassContext, new_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.plugins.native.native_library import NATIVE

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def pick_top_logits(model: ir.Model, context: PassContext) -> Outcome:
    """Given  output logits f32[N,V]
    Result outputs logits; top_logits f32[N,K], top_ids i32[N,K] = qwen.native::TopLogits(logits), K = min(64, V)
    Where logits are Cast(x) of 16 bits, top_logits, top_ids, logits = qwen.native::WideTopLogits(x): one kernel reads x once."""
    logits = model.graph.outputs[0]
    if "top_logits" not in context.choices:
        return Outcome.nothing("the backend has no kernel of TopLogits")
    if logits.name != LOGITS or logits.shape is None:
        return Outcome.nothing("the graph has no logits")
    *rows, V = logits.shape
    if not isinstance(V, int):
        raise TypeError("the vocabulary has no fixed size")
    cast = logits.producer()
    narrow = cast.inputs[0] if cast is not None and cast.op_type == "Cast" and "wide_top_logits" in context.choices else None
    if cast is not None and narrow is not None and narrow.dtype in _HALVES and not logits.uses():
        node = new_node(NATIVE, "WideTopLogits", [narrow], 3, dtype=ir.DataType.FLOAT, k=TOP_COUNT)
        values, ids, wide = node.outputs
        wide.shape = logits.shape
        model.graph.outputs[0] = wide
        model.graph.remove(cast, safe=True)
        wide.name = LOGITS
    else:
        node = new_node(NATIVE, "TopLogits", [logits], 2, dtype=ir.DataType.FLOAT, k=TOP_COUNT)
        values, ids = node.outputs
    values.name, ids.name = TOP_LOGITS, TOP_IDS
    values.shape = ids.shape = ir.Shape([*rows, min(TOP_COUNT, V)])
    ids.type = ir.TensorType(ir.DataType.INT32)
    model.graph.append(node)
    model.graph.outputs.extend((values, ids))
    return Outcome(1)
