"""One op of the CPU plugin as a session of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnxruntime as ort
from onnx import helper


def plugin_session(
    library: str, node: onnx.NodeProto, given: Sequence[onnx.ValueInfoProto], made: Sequence[onnx.ValueInfoProto], threads: int
) -> ort.InferenceSession:
    """A graph of this node alone; `library` has its kernel."""
    graph = helper.make_graph([node], node.op_type, given, made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("qwen.native", 1)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(library)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
