"""Time of the CUDA plugin's DeltaNet by sequences, tokens, pending rows and accepted rows.

    python benchmarks/gpu_kernels.py [--heads 16,32] [--layers 48] [--dtype float16] [--plain]
    python benchmarks/gpu_kernels.py --heads 16,16 --sequences 1,16,32,64,128 [--tokens 1,4]

With --sequences the rows are steps (one token, nothing pending) and verifies (3 pending tokens before), beside the time of copying as many
bytes of states on the device, which reads and writes what a step has to.

Runs on a CUDA host with onnxruntime-gpu, onnx and the built plugin; QWEN_EXPORT_CUDA_PLUGIN picks another build of it, and --plain leaves
out the rows with a transaction, for builds from before it. Each row is one recorded graph of independent layers, whose states together do
not fit the second-level cache; the time is that of the fastest of 50 replays, per layer. Kernels overlap with the one before them, as in a
decoder, but there a product lies between.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnxruntime as ort
from gpu_replay import fastest_replay
from onnx import helper

from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.runtimes.memory import cuda_memory
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


def counts(value: int, B: int) -> CudaBuffer:
    buffer = CudaBuffer("int64", (B,))
    buffer.write(as_bytes(np.full(B, value, np.int64)))
    return buffer


def repeated(rng: np.random.Generator, dtype: str, B: int, shape: tuple[int, ...]) -> CudaBuffer:
    """The same random values for each of B sequences."""
    buffer, one = CudaBuffer(dtype, (B, *shape)), encode((rng.normal(size=shape) / 8).astype(np.float32), dtype)
    for b in range(B):
        buffer.write(one, b * one.nbytes)
    return buffer


def measure(Hk: int, Hv: int, layers: int, dtype: str, T: int, P: int | None, accepted: int, commit: int, B: int = 1) -> float:
    """Microseconds per layer."""
    rng, C = np.random.default_rng(0), (2 * Hk + Hv) * 128
    width = C + Hv * 128 + 2 * Hv
    shared = {
        "packed": repeated(rng, dtype, B, (T, width)),
        "conv": filled(rng, dtype, (C, 4)),
        "a_log": filled(rng, "float", (Hv,)),
        "dt_bias": filled(rng, "float", (Hv,)),
        "norm": filled(rng, dtype, (128,)),
    }
    controls = {}
    if P is not None:
        controls = {"pending": repeated(rng, dtype, B, (P, width)), "accepted": counts(accepted, B), "commit": counts(commit, B)}
    inputs, outputs, nodes = shared | controls, {}, []
    for i in range(layers):
        states = {f"history{i}": CudaBuffer(dtype, (B, 3, C)), f"state{i}": CudaBuffer("float", (B, Hv, 128, 128))}
        inputs |= states
        made = {f"y{i}": CudaBuffer(dtype, (B, T, Hv * 128))} | {f"{name}.next": buffer for name, buffer in states.items()}
        outputs |= made
        names = [*shared, *states, *controls]
        nodes.append(helper.make_node("DeltaNet", names, list(made), domain=NATIVE, key_heads=Hk, epsilon=1e-6))
    return fastest_replay(nodes, inputs, outputs, replays=55) / layers * 1e6


def copying(Hv: int, layers: int, B: int) -> float:
    """Microseconds to copy the states of a layer to other memory of the device."""
    states = [CudaBuffer("float", (B, Hv, 128, 128)) for _ in range(layers + 1)]
    best = float("inf")
    for _ in range(20):
        cuda_memory.wait()
        began = time.perf_counter()
        for to, source in pairwise(states):
            cuda_memory.copy_later(to.address, source.address, to.nbytes, 0)
        cuda_memory.wait()
        best = min(best, time.perf_counter() - began)
    return best / layers * 1e6


def by_sequences(Hk: int, Hv: int, dtype: str, sequences: Sequence[int], tokens: Sequence[int]) -> None:
    print("| sequences | tokens | us per layer | copying | share |\n|---|---|---|---|---|")
    for B in sequences:
        layers = max(2, min(24, (1 << 30) // (B * Hv * 128 * 128 * 4)))  # a gigabyte of states
        limit = copying(Hv, layers, B)
        for T in tokens:
            us = measure(Hk, Hv, layers, dtype, T, max(4, T), 0 if T == 1 else 3, 1 if T == 1 else 0, B)
            print(f"| {B} | {T} | {us:.1f} | {limit:.1f} | {limit / us:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="16,32", help="key heads, value heads")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--dtype", default="float16", choices=("float", "float16", "bfloat16"))
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--sequences", help="of a call, e.g. 1,16,64")
    parser.add_argument("--tokens", default="1,4")
    options = parser.parse_args()
    Hk, Hv = (int(part) for part in options.heads.split(","))
    ort.preload_dlls()
    if options.sequences:
        sequences, tokens = ([int(part) for part in text.split(",")] for text in (options.sequences, options.tokens))
        by_sequences(Hk, Hv, options.dtype, sequences, tokens)
        return
    print("| tokens | pending | accepted | commit | us per layer |\n|---|---|---|---|---|")
    for T, P, accepted, commit in ROWS:
        if P is None or not options.plain:
            us = measure(Hk, Hv, options.layers, options.dtype, T, P, accepted, commit)
            print(f"| {T} | {'-' if P is None else P} | {accepted} | {commit} | {us:.2f} |", flush=True)


if __name__ == "__main__":
    main()
