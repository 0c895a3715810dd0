"""The quantized product of the CPU plugin beside ONNX Runtime's MatMulNBits (accuracy_level 4), in one process, one thread.

    .venv/bin/python benchmarks/quantized_products.py [--rows 1,2,4,8,64] [--formats 4:32,4:128,8:32]

60 matrices of 4096 x 1024, more than a processor caches. Times are CPU time of the thread, least of many runs taken in turns, so that other
work on the machine does not count; the memory's bandwidth is shared all the same.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper

from qwen_export.graphs.quantization.packing import QuantFormat
from qwen_export.plugins.native.native_library import find_library

COUNT, N, K = 60, 4096, 1024


def session(nodes: list[NodeProto], weights: list[TensorProto]) -> ort.InferenceSession:
    outputs = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in nodes]
    graph = helper.make_graph(nodes, "products", [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)], outputs, weights)
    domains = [helper.make_opsetid(name, version) for name, version in (("", 21), ("qwen.native", 1), ("com.microsoft", 1))]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(find_library("cpu")))
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def tensor(name: str, kind: int, values: Any) -> TensorProto:
    return helper.make_tensor(name, kind, values.shape, values.tobytes(), raw=True)


def ours(format: QuantFormat) -> ort.InferenceSession:
    # Different values in each: ONNX Runtime merges equal nodes.
    rng, shape = np.random.default_rng(0), format.packed_shape(N, K)
    attributes: dict[str, Any] = format.attributes(N, K)
    return session(
        [helper.make_node("QuantLinear", ["x", f"w{i}"], [f"y{i}"], domain="qwen.native", epsilon=0.0, **attributes) for i in range(COUNT)],
        [tensor(f"w{i}", TensorProto.UINT8, rng.integers(0, 64, shape, np.uint8)) for i in range(COUNT)],
    )


def theirs(format: QuantFormat) -> ort.InferenceSession:
    blocks = format.blocks(K)
    rng, size = np.random.default_rng(0), (N, blocks, format.block * format.bits // 8)
    scales = np.full((N, blocks), 0.01, np.float32)
    attributes = {"bits": format.bits, "block_size": format.block, "N": N, "K": K, "accuracy_level": 4}
    nodes = [
        helper.make_node("MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft", **attributes) for i in range(COUNT)
    ]
    weights = [tensor(f"w{i}", TensorProto.UINT8, rng.integers(0, 256, size, np.uint8)) for i in range(COUNT)]
    return session(nodes, [*weights, *(tensor(f"s{i}", TensorProto.FLOAT, scales) for i in range(COUNT))])


def milliseconds(made: ort.InferenceSession, x: Any) -> float:
    begin = time.thread_time()
    made.run(None, {"x": x})
    return (time.thread_time() - begin) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8,64")
    parser.add_argument("--formats", default="4:32,4:128,8:32", help="bits:block")
    options = parser.parse_args()
    memory = np.zeros(1 << 24, np.int64)
    reads = []
    for _ in range(10):
        begin = time.thread_time()
        memory.sum()
        reads.append(memory.nbytes / (time.thread_time() - begin) / 1e9)
    print(f"plain read: {max(reads):.1f} GB/s\n")
    print("| format | rows | ours ms | GB/s | MatMulNBits ms | ratio |\n|---|---|---|---|---|---|")
    for text in options.formats.split(","):
        format = QuantFormat(*map(int, text.split(":")))
        mine, other = ours(format), theirs(format)
        nbytes = COUNT * format.panel_bytes(K) * N // 16
        for M in map(int, options.rows.split(",")):
            x = np.random.default_rng(M).normal(size=(M, K)).astype(np.float32)
            pairs = [(milliseconds(mine, x), milliseconds(other, x)) for _ in range(max(3, 25 // max(1, M // 8)))]
            a, b = (min(times) for times in zip(*pairs, strict=True))
            print(f"| int{format.bits} block {format.block} | {M} | {a:.2f} | {nbytes / a / 1e6:.1f} | {b:.2f} | {b / a:.2f} |", flush=True)


if __name__ == "__main__":
    main()
