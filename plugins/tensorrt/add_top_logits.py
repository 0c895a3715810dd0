"""The largest logits leave the graph beside all of them, so that a sampler copies kilobytes, not a vocabulary."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_export.bundle_contract import LOGITS, TOP_COUNT, TOP_IDS, TOP_LOGITS
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.plugins.emitter import Emitter, static_shape

# TopK over a row is one block of threads; groups are as many. Larger than what it gains where a vocabulary has no divisor near this.
_GROUP = 4096


def add_top_logits(model: ir.Model, context: PassContext) -> Outcome:
    """Given  output logits f32[N,V]
    Result also outputs top_logits f32[N,K] and top_ids i32[N,K], the K = min(64, V) largest in falling order"""
    graph = model.graph
    logits = next((value for value in graph.outputs if value.name == LOGITS), None)
    if logits is None or logits.shape is None:
        return Outcome.nothing("the graph has no logits")
    N, V = static_shape(logits)
    emit, K = Emitter(graph, "top"), min(TOP_COUNT, V)
    groups = _groups(V, K)
    values, ids = _top(emit, emit.reshape(logits, N, groups, V // groups) if groups > 1 else logits, K)
    if groups > 1:
        base = emit.array("top_base", (np.arange(groups, dtype=np.int64) * (V // groups))[:, None])
        ids = emit.reshape(emit.add(ids, base), N, groups * K)
        values, chosen = _top(emit, emit.reshape(values, N, groups * K), K)
        (ids,) = emit("", "GatherElements", [ids, chosen], like=ids, axis=1)
    ids = emit.cast(ids, ir.DataType.INT32)
    graph.extend(emit.nodes)
    for value, name in ((values, TOP_LOGITS), (ids, TOP_IDS)):
        value.name, value.shape = name, ir.Shape([N, K])
        graph.outputs.append(value)
    return Outcome(1)


def _top(emit: Emitter, x: ir.Value, K: int) -> tuple[ir.Value, ir.Value]:
    values, ids = emit("", "TopK", [x, emit.ints(K)], 2, like=x, axis=-1)
    ids.type = ir.TensorType(ir.DataType.INT64)
    return values, ids


def _groups(V: int, K: int) -> int:
    """The divisor of V that leaves groups of about _GROUP, 1 where none does."""
    fitting = [g for g in range(2, V // K + 1) if V % g == 0 and K <= V // g <= 2 * _GROUP]
    return min(fitting, key=lambda g: abs(V // g - _GROUP), default=1) if V > 2 * _GROUP else 1
