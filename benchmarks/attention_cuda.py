"""Attention on CUDA: our GatedAttention beside ONNX Runtime's GroupQueryAttention and PagedAttention, in one run.

    python benchmarks/attention_cuda.py [--heads 16,4,256,64] [--layers 8] [--only ours,GroupQueryAttention]

Per call of T tokens behind a past, microseconds of one layer and, for ours, the share of memory's rate that reading the past is. A graph
has `layers` nodes, each with caches of its own, and is recorded: what is measured is the device. All have head norms and rotation inside,
ours also the output gate, which the others leave to two more nodes. A form that refuses a call is "-", with its message below the table.
GroupQueryAttention takes one sequence, or one token; what it is given as the length of the caches is that of the longest.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import helper

from qwen_export.plugins.native.native_library import NATIVE, find_library
from qwen_export.runtimes.memory.buffers import ELEMENTS, as_bytes
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer
from qwen_export.runtimes.memory.host_buffer import HostBuffer

Array = npt.NDArray[np.generic]
DTYPE = "bfloat16"
RATE = 4.28e12
"""Bytes per second that an H200 reads."""
PAGE = 256
"""Tokens of a page of PagedAttention."""
FORMS = ("ours", "GroupQueryAttention", "PagedAttention")
_graphs = itertools.count(1)


class Form:
    """A graph of some layers of one op, bound and recorded."""

    def __init__(self, form: str, heads: tuple[int, int, int, int], lengths: list[int], T: int, layers: int) -> None:
        self._heads, self._lengths, self._T = heads, lengths, T
        self._values: dict[str, Any] = {}
        self._given: list[Any] = []
        nodes, made = [], []
        shared = getattr(self, f"_{form.lower()}_inputs")()
        for layer in range(layers):
            names, cache, attributes, domain, op = shared
            own = [f"{name}.{layer}" if name.endswith("_cache") else name for name in names]
            outputs = [f"y.{layer}", f"k_out.{layer}", f"v_out.{layer}"]
            nodes.append(helper.make_node(op, own, outputs, domain=domain, **attributes))
            for name, out in (("k_cache", outputs[1]), ("v_cache", outputs[2])):
                self._input(f"{name}.{layer}", DTYPE, cache)
                made.append((out, self._values[f"{name}.{layer}"]))
            rows = (len(lengths), T) if form != "PagedAttention" else (len(lengths) * T,)
            made.append((outputs[0], CudaBuffer(DTYPE, (*rows, heads[0] * heads[2]))))
        outs = [helper.make_tensor_value_info(name, ELEMENTS[value.dtype][1], None) for name, value in made]
        opsets = [helper.make_opsetid(domain, 1) for domain in (NATIVE, "com.microsoft")] + [helper.make_opsetid("", 21)]
        model = helper.make_model(helper.make_graph(nodes, form, self._given, outs), opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.register_custom_ops_library(str(find_library("cuda")))
        provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1", "sdpa_kernel": "1"})
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider, "CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        for name, value in self._values.items():
            where = "cpu" if isinstance(value, HostBuffer) else "cuda"
            self._binding.bind_input(name, where, 0, ELEMENTS[value.dtype][1], value.shape, value.address)
        for name, value in made:
            self._binding.bind_output(name, "cuda", 0, ELEMENTS[value.dtype][1], value.shape, value.address)
        self._kept, self._layers = made, layers
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(next(_graphs)))

    def microseconds(self, repeats: int) -> float:
        """Of a layer; the fastest of some runs, each of the whole graph."""
        for _ in range(3):
            self._session.run_with_iobinding(self._binding, self._options)
        best = float("inf")
        for _ in range(repeats):
            self._binding.synchronize_inputs()
            began = time.perf_counter()
            for _ in range(4):
                self._session.run_with_iobinding(self._binding, self._options)
            self._binding.synchronize_outputs()
            best = min(best, (time.perf_counter() - began) / 4)
        return best / self._layers * 1e6

    def _input(self, name: str, dtype: str, shape: tuple[int, ...], values: Array | None = None, *, host: bool = False) -> str:
        buffer = HostBuffer(dtype, shape) if host else CudaBuffer(dtype, shape)
        if values is not None:
            buffer.write(as_bytes(values))
        elif not name.startswith(("k_cache", "v_cache")):  # what is in the caches costs nothing
            numbers = np.random.default_rng(0).normal(size=shape).astype(np.float32).view(np.uint32) >> 16
            buffer.write(as_bytes(numbers.astype(np.uint16)))
        self._values[name] = buffer
        self._given.append(helper.make_tensor_value_info(name, ELEMENTS[dtype][1], shape))
        return name

    def _tables(self) -> list[str]:
        rows = max(self._lengths) + self._T
        return [self._input(name, DTYPE, (rows, self._heads[3] // 2)) for name in ("cos", "sin")]

    def _norms(self) -> list[str]:
        return [self._input(name, DTYPE, (self._heads[2],)) for name in ("q_norm", "k_norm")]

    def _ours_inputs(self) -> Any:
        (Hq, Hkv, D, _), B, T = self._heads, len(self._lengths), self._T
        packed = self._input("packed", DTYPE, (B, T, 2 * (Hq + Hkv) * D))
        names = [packed, "", "", "", *self._norms(), *self._tables(), "k_cache", "v_cache"]
        names.append(self._input("length", "int64", (B,), np.array(self._lengths, np.int64)))
        attributes = {"num_heads": Hq, "kv_num_heads": Hkv, "scale": D**-0.5, "epsilon": 1e-6}
        return names, (B, Hkv, max(self._lengths) + T, D), attributes, NATIVE, "GatedAttention"

    def _groupqueryattention_inputs(self) -> Any:
        (Hq, Hkv, D, _), B, T = self._heads, len(self._lengths), self._T
        S = max(self._lengths) + T
        names = [self._input("packed", DTYPE, (B, T, (Hq + 2 * Hkv) * D)), "", "", "k_cache", "v_cache"]
        names.append(self._input("last", "int32", (B,), np.array(self._lengths, np.int32) + T - 1))
        names += [self._input("total", "int32", (), np.array(S, np.int32), host=True), *self._tables(), *[""] * 5, *self._norms()]
        attributes = {"num_heads": Hq, "kv_num_heads": Hkv, "scale": D**-0.5, "do_rotary": 1, "qk_norm_epsilon": 1e-6}
        return names, (B, Hkv, S, D), attributes, "com.microsoft", "GroupQueryAttention"

    def _pagedattention_inputs(self) -> Any:
        (Hq, Hkv, D, _), B, T = self._heads, len(self._lengths), self._T
        pages = [-(-(length + T) // PAGE) for length in self._lengths]
        ends = np.cumsum(pages)
        table = np.zeros((B, max(pages)), np.int32)
        for b, (end, count) in enumerate(zip(ends, pages, strict=True)):
            table[b, :count] = np.arange(end - count, end)
        names = [self._input("packed", DTYPE, (B * T, (Hq + 2 * Hkv) * D)), "", "", "k_cache", "v_cache"]
        names.append(self._input("cumulative", "int32", (B + 1,), np.arange(B + 1, dtype=np.int32) * T))
        names.append(self._input("past", "int32", (B,), np.array(self._lengths, np.int32)))
        names.append(self._input("table", "int32", table.shape, table))
        names += [*self._tables(), "", "", *self._norms(), "", ""]
        bounds = np.array([T, max(self._lengths) + T, max(self._lengths) + T], np.int32)
        names.append(self._input("bounds", "int32", (3,), bounds, host=True))
        attributes = {"num_heads": Hq, "kv_num_heads": Hkv, "scale": D**-0.5, "do_rotary": 1, "qk_norm_epsilon": 1e-6}
        return names, (int(ends[-1]), PAGE, Hkv, D), attributes, "com.microsoft", "PagedAttention"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="16,4,256,64", help="query heads, key heads, values of a head, values that turn (4B)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default=",".join(FORMS))
    arguments = parser.parse_args()
    Hq, Hkv, D, R = map(int, arguments.heads.split(","))
    ort.preload_dlls()
    steps = [(1, T, past) for past in (130, 1024, 4096, 32768, 131072) for T in (1, 2, 4, 5, 9)]
    batches = [(B, T, past) for B, past in ((8, 4096), (32, 1024), (128, 300)) for T in (1, 4)]
    prompts = [(1, T, past) for T, past in ((128, 0), (512, 0), (2048, 0), (8192, 0), (512, 32768))]
    ragged = [("ragged", 1), ("ragged", 4)]
    messages: dict[str, str] = {}
    print(f"{'B':>6} {'T':>5} {'past':>7} " + " ".join(f"{form:>20}" for form in FORMS) + "   memory")
    for B, T, *past in [*steps, *batches, *ragged, *prompts]:
        lengths = [100 + 130 * i * i for i in range(16)] if B == "ragged" else [past[0]] * int(B)
        cells = []
        for form in FORMS:
            try:
                if form not in arguments.only.split(","):
                    raise NotImplementedError("not requested")
                time_us = Form(form, (Hq, Hkv, D, R), lengths, T, arguments.layers).microseconds(arguments.repeats)
                cells.append(f"{time_us:20.1f}")
            except Exception as error:  # what a kernel refuses, in whatever type
                cells.append(f"{'-':>20}")
                messages.setdefault(str(error).strip().splitlines()[0][-200:], f"{form}, B {B} T {T}")
        share = ""
        if cells[0].strip() != "-":
            read = sum(length + T for length in lengths) * Hkv * D * 4
            share = f"{read / float(cells[0]) * 1e6 / RATE:8.0%}"
        print(f"{B:>6} {T:5} {past[0] if past else max(lengths):7} " + " ".join(cells) + share, flush=True)
    for message, where in messages.items():
        print(f"{where}: {message}")


if __name__ == "__main__":
    main()
