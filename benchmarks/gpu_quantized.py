"""Time of the CUDA plugin's quantized products and experts, next to its products in fp16.

    python benchmarks/gpu_quantized.py [--rows 1,4,8,64,512]

Runs on a CUDA host with onnxruntime-gpu, onnx and the built plugin. Each figure is one recorded graph of independent nodes, whose weights
together do not fit the second-level cache; the time is that of the fastest of 30 replays, per node. GB/s counts the bytes of weights.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import onnxruntime as ort
from gpu_replay import fastest_replay
from onnx import helper

from qwen_export.graphs.quantization.packing import QuantFormat
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.runtimes.memory.buffers import encode
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer

SHAPES = ((4096, 1024), (1024, 3584), (4096, 4096), (4096, 12288))
SWIGLU = ((3584, 1024), (12288, 4096))
FORMATS = (None, QuantFormat(4, 32), QuantFormat(4, 128), QuantFormat(8, 32))
_TOGETHER = 256 << 20


def weights(format: QuantFormat | None, shape: tuple[int, ...], matrices: int = 1) -> CudaBuffer:
    """Random codes under small scales: an arbitrary pattern of bytes could be a scale that is not a number."""
    if format is None:
        buffer = CudaBuffer("float16", shape)
        buffer.write(np.full(buffer.nbytes // 2, 0x1C11, np.uint16).view(np.uint8))
        return buffer
    packed = format.packed_shape(*shape)
    buffer = CudaBuffer("uint8", packed if matrices == 1 else (matrices, *packed))
    buffer.write(np.full(buffer.nbytes // 2, 0x1C11, np.uint16).view(np.uint8))
    return buffer


def fastest(nodes: list[Any], inputs: dict[str, CudaBuffer], outputs: dict[str, CudaBuffer]) -> float:
    """Microseconds per node."""
    return fastest_replay(nodes, inputs, outputs, replays=33) / len(nodes) * 1e6


def activations(*shape: int) -> CudaBuffer:
    buffer = CudaBuffer("float16", shape)
    buffer.write(encode((np.random.default_rng(0).normal(size=shape)).astype(np.float32), "float16"))
    return buffer


def product(op: str, format: QuantFormat | None, N: int, K: int, M: int) -> tuple[float, int]:
    """Microseconds and bytes of weights. `N` are columns of the result."""
    rows = 2 * N if op == "SwiGlu" else N
    one = rows * K * 2 if format is None else format.packed_shape(rows, K)[0] * format.panel_bytes(K)
    count = max(4, min(48, _TOGETHER // one))
    inputs = {"x": activations(1, M, K), "norm": activations(K)} | {f"w{i}": weights(format, (rows, K)) for i in range(count)}
    outputs = {f"y{i}": CudaBuffer("float16", (1, M, N)) for i in range(count)}
    norm = ["norm"] if op == "SwiGlu" else ["", "norm"]
    attributes: dict[str, Any] = {"epsilon": 1e-6} | (format.attributes(rows, K) if format else {})
    name = op if format is None else f"Quant{op}"
    nodes = [helper.make_node(name, ["x", f"w{i}", *norm], [f"y{i}"], domain=NATIVE, **attributes) for i in range(count)]
    return fastest(nodes, inputs, outputs), one


def experts(format: QuantFormat, M: int, H: int = 2048, inner: int = 512, E: int = 256, K: int = 8) -> float:
    """Microseconds of a layer's experts."""
    layers = 4
    inputs = {"x": activations(1, M, H), "logits": activations(1, M, E)}
    attributes: dict[str, Any] = {"top_k": K, "inner": inner}
    found = format.attributes(0, 0)
    for prefix in ("gate_up", "down"):
        attributes |= {f"{prefix}_{name}": found[name] for name in ("bits", "block", "zeros", "wide_scales")}
    for i in range(layers):
        inputs |= {f"u{i}": weights(format, (2 * inner, H), E), f"d{i}": weights(format, (H, inner), E)}
    outputs = {f"y{i}": CudaBuffer("float16", (1, M, H)) for i in range(layers)}
    nodes = [helper.make_node("QuantMoe", ["x", "logits", f"u{i}", f"d{i}"], [f"y{i}"], domain=NATIVE, **attributes) for i in range(layers)]
    return fastest(nodes, inputs, outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,8,64,512")
    rows = [int(part) for part in parser.parse_args().rows.split(",")]
    ort.preload_dlls()
    print("| product | format | " + " | ".join(f"{M} rows, us (GB/s)" for M in rows) + " |\n|---|---|" + "---|" * len(rows))
    for op, shapes in (("Linear", SHAPES), ("SwiGlu", SWIGLU)):
        for N, K in shapes:
            for format in FORMATS:
                label = f"int{format.bits} block {format.block}" if format else "fp16"
                cells = [f"{us:.2f} ({nbytes / us / 1e3:.0f})" for us, nbytes in (product(op, format, N, K, M) for M in rows)]
                print(f"| {op} {N}x{K} | {label} | {' | '.join(cells)} |", flush=True)
    for format in (QuantFormat(4, 32), QuantFormat(8, 32)):
        print(f"| experts 8 of 256, 2048/512 | int{format.bits} block 32 | " + " | ".join(f"{experts(format, M):.1f}" for M in rows) + " |")


if __name__ == "__main__":
    main()
