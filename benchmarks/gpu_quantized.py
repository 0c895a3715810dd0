"""Time of the CUDA plugin's quantized products and experts, next to its products in fp16.

    python benchmarks/gpu_quantized.py [--rows 1,4,8,64,512]

Runs on a CUDA host with onnxruntime-gpu, onnx and the built plugin. Each figure is one recorded graph of independent nodes, whose weights
together do not fit the second-level cache; the time is that of the fastest of 30 replays, per node. GB/s counts the bytes of weights.
"""

from __future__ import annotations

import argparse
from typing import Any, Final, Literal

import numpy as np
import onnxruntime as ort
from gpu_replay import fastest_replay
from onnx import helper

from qwen_export.graphs.quantization.packing import QuantFormat
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.runtimes.memory.buffers import encode
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer

SHAPES = ((4096, 1024), (8192, 1024), (1024, 3584), (12288, 2560), (2560, 9216), (4096, 4096), (4096, 12288))
SWIGLU = ((3584, 1024), (9216, 2560), (12288, 4096))
Format = QuantFormat | Literal["fp8"] | None
FP8: Final = "fp8"
FORMATS: tuple[Format, ...] = (None, QuantFormat(4, 32), QuantFormat(4, 128), QuantFormat(8, 32), FP8)
_TOGETHER = 256 << 20


def weights(format: Format, name: str, shape: tuple[int, int], matrices: int = 1) -> dict[str, CudaBuffer]:
    """The inputs of a node that are a matrix. Codes under small scales: an arbitrary pattern of bytes could be a scale that is not a
    number."""
    front = () if matrices == 1 else (matrices,)
    if format == FP8:
        N, K = shape
        scales = CudaBuffer("float", (*front, -(-N // 128), -(-K // 512) * 4))
        scales.write(np.full(scales.nbytes // 4, 1e-3, np.float32).view(np.uint8))
        parts = {name: CudaBuffer("uint8", (*front, N, K)), f"{name}.scales": scales}
    elif isinstance(format, QuantFormat):
        parts = {name: CudaBuffer("uint8", (*front, *format.packed_shape(*shape)))}
    else:
        parts = {name: CudaBuffer("float16", shape)}
    parts[name].write(np.full(parts[name].nbytes // 2, 0x1C11, np.uint16).view(np.uint8))
    return parts


def described(format: Format, N: int, K: int) -> dict[str, int]:
    """The attributes of a node on a matrix."""
    return {"N": N, "K": K, "rows": 128} if format == FP8 else format.attributes(N, K) if isinstance(format, QuantFormat) else {}


def op_name(format: Format, op: str) -> str:
    return f"Fp8{op}" if format == FP8 else f"Quant{op}" if format else op


def label(format: Format) -> str:
    return f"int{format.bits} block {format.block}" if isinstance(format, QuantFormat) else "fp8 128x128" if format else "fp16"


def fastest(nodes: list[Any], inputs: dict[str, CudaBuffer], outputs: dict[str, CudaBuffer]) -> float:
    """Microseconds per node."""
    return fastest_replay(nodes, inputs, outputs, replays=33) / len(nodes) * 1e6


def activations(*shape: int) -> CudaBuffer:
    buffer = CudaBuffer("float16", shape)
    buffer.write(encode((np.random.default_rng(0).normal(size=shape)).astype(np.float32), "float16"))
    return buffer


def product(op: str, format: Format, N: int, K: int, M: int) -> tuple[float, int]:
    """Microseconds and bytes of weights. `N` are columns of the result."""
    rows = 2 * N if op == "SwiGlu" else N
    integers = isinstance(format, QuantFormat)
    one = format.packed_shape(rows, K)[0] * format.panel_bytes(K) if integers else rows * K * (1 if format else 2)
    count = max(4, min(48, _TOGETHER // one))
    inputs, matrices = {"x": activations(1, M, K), "norm": activations(K)}, [weights(format, f"w{i}", (rows, K)) for i in range(count)]
    for matrix in matrices:
        inputs |= matrix
    outputs = {f"y{i}": CudaBuffer("float16", (1, M, N)) for i in range(count)}
    norm = ["norm"] if op == "SwiGlu" else ["", "norm"]
    attributes: dict[str, Any] = {"epsilon": 1e-6} | described(format, rows, K)
    name = op_name(format, op)
    nodes = [helper.make_node(name, ["x", *w, *norm], [f"y{i}"], domain=NATIVE, **attributes) for i, w in enumerate(matrices)]
    return fastest(nodes, inputs, outputs), one


def experts(format: Format, M: int, H: int = 2048, inner: int = 512, E: int = 256, K: int = 8) -> float:
    """Microseconds of a layer's experts."""
    layers = 4
    inputs = {"x": activations(1, M, H), "logits": activations(1, M, E)}
    attributes: dict[str, Any] = {"top_k": K, "inner": inner}
    for prefix in ("gate_up", "down"):
        attributes |= {f"{prefix}_{name}": value for name, value in described(format, 0, 0).items() if name not in ("N", "K")}
    matrices = [weights(format, f"u{i}", (2 * inner, H), E) | weights(format, f"d{i}", (H, inner), E) for i in range(layers)]
    for matrix in matrices:
        inputs |= matrix
    outputs = {f"y{i}": CudaBuffer("float16", (1, M, H)) for i in range(layers)}
    name = op_name(format, "Moe")
    nodes = [helper.make_node(name, ["x", "logits", *w], [f"y{i}"], domain=NATIVE, **attributes) for i, w in enumerate(matrices)]
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
                cells = [f"{us:.2f} ({nbytes / us / 1e3:.0f})" for us, nbytes in (product(op, format, N, K, M) for M in rows)]
                print(f"| {op} {N}x{K} | {label(format)} | {' | '.join(cells)} |", flush=True)
    for format in (QuantFormat(4, 32), QuantFormat(8, 32), FP8):
        print(f"| experts 8 of 256, 2048/512 | {label(format)} | " + " | ".join(f"{experts(format, M):.1f}" for M in rows) + " |")


if __name__ == "__main__":
    main()
