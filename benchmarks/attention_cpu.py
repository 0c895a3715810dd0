"""Attention on the CPU: our GatedAttention beside ONNX Runtime's GroupQueryAttention, in one run.

    python benchmarks/attention_cpu.py [--threads 2] [--heads 8,2,256,64] [--repeats 7]

Per call of T tokens behind a past, microseconds of one layer. GatedAttention also has the head norms and the gate, which the other form
computes in nodes of its own; those are not counted here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from qwen_export.cache_formats import CACHE_FORMATS
from qwen_export.graphs.ops.cache_rows import CACHE_DTYPES, stored_rows
from qwen_export.plugins.native.native_library import NATIVE, find_library
from qwen_export.runtimes.memory.buffers import ELEMENTS

Array = npt.NDArray[np.generic]
_LAYERS = 6
"""Caches that take turns, as the layers of a model do: a cache is not in the processor's caches because it was just read."""


def session(node: object, inputs: dict[str, int], threads: int) -> ort.InferenceSession:
    """A graph of one node; `inputs` have element types by name, y is fp32."""
    given = [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()]
    kinds = {"y": TensorProto.FLOAT} | dict.fromkeys(("k_out", "v_out"), inputs["k_cache"])
    made = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    opsets = [helper.make_opsetid(domain, 1) for domain in (NATIVE, "com.microsoft")] + [helper.make_opsetid("", 21)]
    model = helper.make_model(helper.make_graph([node], "attention", given, made), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(find_library("cpu")))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Case:
    """One call of both ops over the same caches."""

    def __init__(self, heads: tuple[int, int, int, int], B: int, T: int, past: int, threads: int, kept: str = "fp32") -> None:
        """`kept`: the format of our caches; others than fp32 are not compared with anything."""
        Hq, Hkv, D, R = heads
        rng = np.random.default_rng(0)
        S = past + T

        def normal(*shape: int) -> Array:
            return rng.normal(size=shape).astype(np.float32)

        angles = np.arange(S)[:, None] * 0.5 ** np.arange(R // 2)
        self._kept = CACHE_FORMATS[kept].element.manifest
        rows = (stored_rows(torch.from_numpy(normal(B, Hkv, S, D)), CACHE_DTYPES[kept]) for _ in range(2 * _LAYERS))
        values = [row.view(torch.uint8).numpy() if kept == "fp8" else row.numpy() for row in rows]
        self._caches = [(values[2 * layer], values[2 * layer + 1]) for layer in range(_LAYERS)]
        shared = {
            "q": normal(B, T, Hq * D),
            "k": normal(B, T, Hkv * D),
            "v": normal(B, T, Hkv * D),
            "cos": np.cos(angles).astype(np.float32),
            "sin": np.sin(angles).astype(np.float32),
        }
        ours = shared | {
            "gate": normal(B, T, Hq * D),
            "q_norm": normal(D),
            "k_norm": normal(D),
            "length": np.full(B, past, np.int64),
        }
        theirs = shared | {"last": np.full(B, past + T - 1, np.int32), "total": np.array(past + T, np.int32)}
        counts = {"num_heads": Hq, "kv_num_heads": Hkv, "scale": D**-0.5}
        order = ["q", "k", "v", "gate", "q_norm", "k_norm", "cos", "sin", "k_cache", "v_cache", "length"]
        own = helper.make_node("GatedAttention", order, ["y", "k_out", "v_out"], domain=NATIVE, epsilon=1e-6, **counts)
        order = ["q", "k", "v", "k_cache", "v_cache", "last", "total", "cos", "sin"]
        other = helper.make_node("GroupQueryAttention", order, ["y", "k_out", "v_out"], domain="com.microsoft", do_rotary=1, **counts)
        self.calls = {"ours": self._bound(own, ours, threads)}
        if kept == "fp32" and (B == 1 or T == 1 or past == 0):
            self.calls["GroupQueryAttention"] = self._bound(other, theirs, threads)

    def _bound(self, node: object, tensors: dict[str, Array], threads: int) -> Callable[[int], None]:
        kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64, np.dtype(np.int32): TensorProto.INT32}
        element = ELEMENTS[self._kept][1]
        types = {name: kinds[value.dtype] for name, value in tensors.items()} | dict.fromkeys(("k_cache", "v_cache"), element)
        made = session(node, types, threads)
        values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}
        values["y"] = ort.OrtValue.ortvalue_from_numpy(np.zeros_like(tensors["q"]))
        bindings = []
        for k_cache, v_cache in self._caches:
            binding = made.io_binding()
            for name in tensors:
                binding.bind_ortvalue_input(name, values[name])
            binding.bind_ortvalue_output("y", values["y"])
            for before, after, cache in (("k_cache", "k_out", k_cache), ("v_cache", "v_out", v_cache)):
                binding.bind_input(before, "cpu", 0, element, cache.shape, cache.ctypes.data)
                binding.bind_output(after, "cpu", 0, element, cache.shape, cache.ctypes.data)
            bindings.append(binding)
        # Caches are bound by their addresses: a call keeps them.
        layers = list(zip(bindings, self._caches, strict=True))
        return lambda layer: made.run_with_iobinding(layers[layer][0])


def microseconds(calls: dict[str, Callable[[int], None]], repeats: int) -> dict[str, float]:
    """Of one layer: the median over passes through all layers, the calls alternating."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            for layer in range(_LAYERS):
                call(layer)
            if number:
                times[name].append((time.perf_counter() - began) / _LAYERS * 1e6)
    return {name: float(np.median(values)) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", default="8,2,256,64", help="query heads, key heads, values of a head, values that turn (0.8B)")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    Hq, Hkv, D, R = map(int, arguments.heads.split(","))
    print(f"{'B':>3} {'T':>4} {'past':>6} {'ours us':>10} {'GQA us':>10} {'ratio':>6}")
    steps = [(1, 1, past) for past in (128, 512, 2048, 8192)]
    verifies = [(1, 4, past) for past in (128, 2048, 8192)]
    prompts = [(1, 256, past) for past in (0, 256, 1024, 4096, 8192)]
    batches = [(8, 1, 512), (8, 1, 2048), (8, 4, 512), (8, 4, 2048)]
    for B, T, past in steps + verifies + prompts + batches:
        made = microseconds(Case((Hq, Hkv, D, R), B, T, past, arguments.threads).calls, arguments.repeats)
        other = made.get("GroupQueryAttention")
        tail = f"{other:10.0f} {made['ours'] / other:6.2f}" if other else f"{'-':>10} {'':>6}"
        print(f"{B:3} {T:4} {past:6} {made['ours']:10.0f} {tail}", flush=True)


if __name__ == "__main__":
    main()
