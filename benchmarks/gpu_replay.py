"""Device time of nodes of the CUDA plugin, as the benchmarks of kernels measure it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import onnxruntime as ort
from onnx import NodeProto, helper

from qwen_export.plugins.native.native_library import NATIVE, find_library
from qwen_export.runtimes.memory.buffers import ELEMENTS
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer


def fastest_replay(nodes: Sequence[NodeProto], inputs: Mapping[str, CudaBuffer], outputs: Mapping[str, CudaBuffer], replays: int) -> float:
    """Seconds of the fastest of some runs of the nodes as one CUDA graph."""
    given = [helper.make_tensor_value_info(name, ELEMENTS[b.dtype][1], b.shape) for name, b in inputs.items()]
    taken = [helper.make_tensor_value_info(name, ELEMENTS[b.dtype][1], b.shape) for name, b in outputs.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(NATIVE, 1)]
    model = helper.make_model(helper.make_graph(list(nodes), "nodes", given, taken), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(find_library("cuda")))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=[("CUDAExecutionProvider", {"enable_cuda_graph": "1"})])
    binding = session.io_binding()
    for bind, buffers in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, b in buffers.items():
            bind(name, "cuda", 0, ELEMENTS[b.dtype][1], b.shape, b.address)
    best = float("inf")
    for _ in range(replays):
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        best = min(best, time.perf_counter() - start)
    return best
