"""Time of the CUDA plugin's DeltaNet by tokens, pending rows and accepted rows.

    python benchmarks/gpu_kernels.py [--heads 16,32] [--layers 48] [--dtype float16] [--plain]

Runs on a CUDA host with onnxruntime-gpu, onnx and the built plugin; QWEN_EXPORT_CUDA_PLUGIN picks another build of it, and --plain leaves
out the rows with a transaction, for builds from before it. Each row is one recorded graph of independent layers, whose states together do
not fit the second-level cache; the time is that of the fastest of 50 replays, per layer. Kernels overlap with the one before them, as in a
decoder, but there a product lies between.
"""

from __future__ import annotations

import argparse

import numpy as np
import onnxruntime as ort
from gpu_replay import fastest_replay
from onnx import helper

from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.runtimes.memory.buffers import as_bytes, encode
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer

# Tokens, rows of the pending buffer (None: no transaction), accepted rows, committed tokens.
ROWS: tuple[tuple[int, int | None, int, int], ...] = (
    (1, None, 0, 1),
    (8, None, 0, 8),
    (512, None, 0, 512),
    (1, 9, 0, 1),
    (1, 9, 1, 1),
    (1, 9, 9, 0),
    (5, 9, 3, 0),
    (9, 9, 0, 0),
    (9, 9, 9, 0),
    (512, 9, 0, 512),
)


def filled(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> CudaBuffer:
    buffer = CudaBuffer(dtype, shape)
    buffer.write(encode((rng.normal(size=shape) / 8).astype(np.float32), dtype))
    return buffer


def counts(value: int) -> CudaBuffer:
    buffer = CudaBuffer("int64", (1,))
    buffer.write(as_bytes(np.array([value], np.int64)))
    return buffer


def measure(Hk: int, Hv: int, layers: int, dtype: str, T: int, P: int | None, accepted: int, commit: int) -> float:
    """Microseconds per layer."""
    rng, C = np.random.default_rng(0), (2 * Hk + Hv) * 128
    width = C + Hv * 128 + 2 * Hv
    shared = {
        "packed": filled(rng, dtype, (1, T, width)),
        "conv": filled(rng, dtype, (C, 4)),
        "a_log": filled(rng, "float", (Hv,)),
        "dt_bias": filled(rng, "float", (Hv,)),
        "norm": filled(rng, dtype, (128,)),
    }
    controls = {}
    if P is not None:
        controls = {"pending": filled(rng, dtype, (1, P, width)), "accepted": counts(accepted), "commit": counts(commit)}
    inputs, outputs, nodes = shared | controls, {}, []
    for i in range(layers):
        states = {f"history{i}": CudaBuffer(dtype, (1, 3, C)), f"state{i}": CudaBuffer("float", (1, Hv, 128, 128))}
        inputs |= states
        made = {f"y{i}": CudaBuffer(dtype, (1, T, Hv * 128))} | {f"{name}.next": buffer for name, buffer in states.items()}
        outputs |= made
        names = [*shared, *states, *controls]
        nodes.append(helper.make_node("DeltaNet", names, list(made), domain=NATIVE, key_heads=Hk, epsilon=1e-6))
    return fastest_replay(nodes, inputs, outputs, replays=55) / layers * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="16,32", help="key heads, value heads")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--dtype", default="float16", choices=("float", "float16", "bfloat16"))
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    Hk, Hv = (int(part) for part in options.heads.split(","))
    ort.preload_dlls()
    print("| tokens | pending | accepted | commit | us per layer |\n|---|---|---|---|---|")
    for T, P, accepted, commit in ROWS:
        if P is None or not options.plain:
            us = measure(Hk, Hv, options.layers, options.dtype, T, P, accepted, commit)
            print(f"| {T} | {'-' if P is None else P} | {accepted} | {commit} | {us:.2f} |", flush=True)


if __name__ == "__main__":
    main()
