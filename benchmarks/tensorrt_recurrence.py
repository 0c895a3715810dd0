"""Device time of the pieces that TensorRT engines are made of: the gated delta rule, attention over a cache, products, top-k.

    python benchmarks/tensorrt_recurrence.py [--only prefill,decode,...] [--flavour tensorrt-rtx] [--kernels] [--json FILE]

Builds one small engine per variant for the GPU that is there, replays it as a CUDA graph and prints milliseconds per call: the median of
several runs. Shapes are those of the 35B-A3B: 16 key and 32 value heads of 128 for the recurrence. `--kernels` lists what a call
launches. Results of the recurrence are compared with the same in float64. Needs torch with CUDA, onnx, onnx_ir.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qwen_export.engine_options import EngineOptions
from qwen_export.plugins.decompose.batched_chunks import batched_chunks
from qwen_export.plugins.decompose.decompose_attention import AttentionSizes, attend, causal_bias
from qwen_export.plugins.decompose.delta_rule import DeltaRule, Recurrence, delta_rule
from qwen_export.plugins.decompose.reduced_step import reduced_step
from qwen_export.plugins.decompose.split_product import SplitEmitter
from qwen_export.plugins.decompose.summed_product import SummedEmitter
from qwen_export.plugins.emitter import Emitter
from qwen_export.plugins.tensorrt.attend_in_parts import Keys, attend_in_parts, slots_of_a_part
from qwen_export.plugins.tensorrt.build_engine import build_engine
from qwen_export.plugins.tensorrt.tensorrt_experts import ExpertSizes, emit_experts
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import Library, load_library

HK, HV, D = 16, 32, 128
QUANTIZED = {"int4": ir.DataType.INT4, "int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
FLOAT, HALF, BF16, I32, I64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT32, ir.DataType.INT64
TORCH = {
    FLOAT: torch.float32,
    HALF: torch.float16,
    BF16: torch.bfloat16,
    I32: torch.int32,
    I64: torch.int64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT4: torch.uint8,
    ir.DataType.FLOAT8E4M3FN: torch.uint8,
    ir.DataType.INT8: torch.int8,
}
Inputs = Mapping[str, tuple[tuple[int, ...], ir.DataType]]
Body = Callable[[Emitter, dict[str, ir.Value]], Sequence[ir.Value]]


@dataclass(frozen=True)
class Case:
    """One engine: `body` emits it from `inputs`. `aliased` maps outputs to the inputs that they are written over, and
    inputs to others whose memory they read."""

    name: str
    inputs: Inputs
    body: Body
    tf32: bool = False
    aliased: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[dict[str, torch.Tensor], list[torch.Tensor]], str] | None = None
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    emitter: type[Emitter] = Emitter


def model_of(case: Case) -> bytes:
    values = {name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)) for name, (shape, dtype) in case.inputs.items()}
    graph = ir.Graph(list(values.values()), [], nodes=[], name="piece", opset_imports={"": 24})
    emit = case.emitter(graph, "n")
    for i, value in enumerate(case.body(emit, values)):
        value.name = f"out{i}"
        graph.outputs.append(value)
    graph.extend(emit.nodes)
    proto = ir.to_proto(ir.Model(graph, ir_version=11))
    return bytes(proto.SerializeToString())


class Engine:
    """A built engine with its buffers, replayed as a CUDA graph."""

    def __init__(self, library: Library, case: Case, options: EngineOptions) -> None:
        api = library.api
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "engine"
            started = time.monotonic()
            self.layers = build_engine(library, model_of(case), path, options, where=case.name).layers
            self.build_s = time.monotonic() - started
            self.runtime = api.Runtime(library.log)
            self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise SystemExit(f"{case.name}: {library.said()}")
        self.context = self.engine.create_execution_context()
        self.buffers: dict[str, torch.Tensor] = {}
        torch.manual_seed(0)
        for i in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(i)
            dtype = ir.DataType[
                {"FLOAT": "FLOAT", "HALF": "FLOAT16", "BF16": "BFLOAT16", "FP8": "FLOAT8E4M3FN"}.get(
                    self.engine.get_tensor_dtype(name).name, self.engine.get_tensor_dtype(name).name
                )
            ]
            shape = tuple(self.engine.get_tensor_shape(name))
            if name in case.aliased:
                if name in case.inputs:
                    continue
                alias = self.engine.get_aliased_input_tensor(name) if hasattr(self.engine, "get_aliased_input_tensor") else None
                print(f"    {name} is the memory of {alias!r}, says the engine")
                continue
            self.buffers[name] = case.values[name].cuda() if name in case.values else _random(shape, dtype)
        for name, source in case.aliased.items():
            self.buffers[name] = self.buffers[source]
        for name, tensor in self.buffers.items():
            if not self.context.set_tensor_address(name, tensor.data_ptr()):
                raise SystemExit(f"{case.name}: {library.said()}")
        self.outputs = [self.buffers[f"out{i}"] for i in range(sum(name.startswith("out") for name in self.buffers))]

    def run(self) -> None:
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise SystemExit("the engine did not run")

    def measure(self, repeats: int = 20, inner: int = 10) -> tuple[float, float]:
        """Milliseconds per call: as a CUDA graph, and launched layer by layer."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run()
            stream.synchronize()
            eager = self._time(self.run, repeats, 1)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=stream):
                    for _ in range(inner):
                        self.run()
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph: {error}", stacklevel=1)
                return float("nan"), eager
            return self._time(graph.replay, repeats, inner), eager

    def _time(self, call: Callable[[], None], repeats: int, inner: int) -> float:
        times = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / inner)
        return statistics.median(times)

    def kernels(self) -> list[str]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            self.run()
            torch.cuda.synchronize()
        return [f"{event.device_time_total:8.1f} us {event.count:4d} x {event.key[:110]}" for event in traced.key_averages()]


def _random(shape: tuple[int, ...], dtype: ir.DataType) -> torch.Tensor:
    if dtype in (I32, I64):
        return torch.zeros(shape, dtype=TORCH[dtype], device="cuda")
    if dtype == ir.DataType.BOOL:
        return torch.ones(shape, dtype=torch.bool, device="cuda")
    if dtype == ir.DataType.INT4:
        return torch.randint(0, 255, (int(np.prod(shape)) // 2,), dtype=torch.uint8, device="cuda")
    if dtype == ir.DataType.FLOAT8E4M3FN:
        return torch.randint(0, 64, shape, dtype=torch.uint8, device="cuda")
    if dtype == ir.DataType.INT8:
        return torch.randint(-127, 127, shape, dtype=torch.int8, device="cuda")
    return (torch.randn(shape, device="cuda") * 0.05).to(TORCH[dtype])


# The recurrence


def recurrence_inputs(T: int) -> dict[str, tuple[tuple[int, ...], ir.DataType]]:
    """As they come from the convolution: token after token."""
    return {
        "q": ((1, T, HK * D), FLOAT),
        "k": ((1, T, HK * D), FLOAT),
        "v": ((1, T, HV * D), FLOAT),
        "g": ((1, T, HV), FLOAT),
        "beta": ((1, T, HV), FLOAT),
        "state": ((1, HV, D, D), FLOAT),
    }


def recurrence_values(T: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    common = torch.randn(1, 1, HK, D, generator=generator)

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    k = unit(unit(common) * 0.7 + unit(torch.randn(1, T, HK, D, generator=generator)) * 0.7)
    q = unit(torch.randn(1, T, HK, D, generator=generator)) * D**-0.5
    return {
        "q": q.reshape(1, T, HK * D),
        "k": k.reshape(1, T, HK * D),
        "v": torch.randn(1, T, HV * D, generator=generator),
        "g": -torch.empty(1, T, HV).exponential_(10.0, generator=generator),
        "beta": torch.rand(1, T, HV, generator=generator) * 0.5 + 0.5,
        "state": torch.zeros(1, HV, D, D),
    }


def heads_first(emit: Emitter, x: dict[str, ir.Value], T: int) -> Recurrence:
    index = emit.array("key_head", np.repeat(np.arange(HK, dtype=np.int32), HV // HK))
    q, k = (emit.gather(emit.transpose(emit.reshape(x[n], 1, T, HK, D), 0, 2, 1, 3), index, axis=1) for n in ("q", "k"))
    v = emit.transpose(emit.reshape(x["v"], 1, T, HV, D), 0, 2, 1, 3)
    g, beta = (emit.reshape(emit.transpose(x[n], 0, 2, 1), 1, HV, T, 1) for n in ("g", "beta"))
    return Recurrence(q, k, v, g, beta, x["state"], T)


def against_float64(given: dict[str, torch.Tensor], outputs: list[torch.Tensor]) -> str:
    """Largest error of outputs and state, relative to the largest entry."""
    T = given["v"].shape[1]
    x = {name: tensor.double() for name, tensor in given.items()}
    q, k = (x[n].reshape(T, HK, D).repeat_interleave(HV // HK, 1) for n in ("q", "k"))
    v, g, beta, S = x["v"].reshape(T, HV, D), x["g"][0].exp(), x["beta"][0], x["state"][0].clone()
    o = torch.empty_like(v)
    for t in range(T):
        S = S * g[t, :, None, None]
        u = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))
        S = S + k[t][:, :, None] * u[:, None]
        o[t] = torch.einsum("hkv,hk->hv", S, q[t])
    got = outputs[0].double().reshape(HV, T, D).transpose(0, 1)
    errors = (got - o).abs().max() / o.abs().max(), (outputs[1][0].double() - S).abs().max() / S.abs().max()
    return f"error of o {errors[0]:.1e}, of the state {errors[1]:.1e}"


def recurrence(name: str, rule: DeltaRule, T: int, tf32: bool = False, emitter: type[Emitter] = Emitter) -> Case:
    def body(emit: Emitter, x: dict[str, ir.Value]) -> Sequence[ir.Value]:
        return rule(emit, heads_first(emit, x, T))

    return Case(name, recurrence_inputs(T), body, tf32, check=against_float64, values=recurrence_values(T), emitter=emitter)


def one_after_the_other(size: int) -> DeltaRule:
    """`delta_rule` over `size` tokens at a time, nothing of one chunk together with another's."""

    def rule(emit: Emitter, given: Recurrence) -> tuple[ir.Value, ir.Value]:
        state, outputs = given.state, []
        for start in range(0, given.length, size):
            o, state = delta_rule(emit, given.part(emit, start, min(start + size, given.length), state))
            outputs.append(o)
        return emit.concat(outputs, axis=2), state

    return rule


def prefill(T: int) -> Iterator[Case]:
    for size in (32, 64, 128):
        yield recurrence(f"prefill T={T} batched chunks of {size} fp32", batched_chunks(size), T)
        yield recurrence(f"prefill T={T} batched chunks of {size} fp16 products", batched_chunks(size, HALF), T)
    yield recurrence(f"prefill T={T} batched chunks of 64 bf16 products", batched_chunks(64, BF16), T)
    yield recurrence(f"prefill T={T} batched chunks of 64 fp32 in two parts", batched_chunks(64), T, emitter=SplitEmitter)
    if T <= 1024:
        yield recurrence(f"prefill T={T} chunks one after the other", one_after_the_other(64), T)


def decode() -> Iterator[Case]:
    yield recurrence("decode, sums", reduced_step, 1)
    yield recurrence("decode, products", delta_rule, 1)
    yield recurrence("decode, products tf32", delta_rule, 1, tf32=True)


def verify() -> Iterator[Case]:
    for T in (4, 8, 9, 16):
        yield recurrence(f"verify of {T}, products", delta_rule, T)
        yield recurrence(f"verify of {T}, sums", delta_rule, T, emitter=SummedEmitter)


# Attention


def attention() -> Iterator[Case]:
    Hq, Hkv, S = 16, 2, 4096 + 512
    size = 256
    for T in (1, 8, 512):
        for form in ("decomposed", "mask", "nonpad"):
            inputs = {
                "q": ((1, Hq, T, size), HALF),
                "k": ((1, Hkv, T, size), HALF),
                "v": ((1, Hkv, T, size), HALF),
                "k_cache": ((1, Hkv, S, size), HALF),
                "v_cache": ((1, Hkv, S, size), HALF),
                "length": ((1,), I32),
            }

            def body(emit: Emitter, x: dict[str, ir.Value], T: int = T, form: str = form) -> Sequence[ir.Value]:
                at = emit.cast(x["length"], I64)
                k, v = (emit("", "TensorScatter", [x[f"{n}_cache"], x[n], at], like=x[n], axis=-2)[0] for n in "kv")
                if form == "decomposed":
                    sizes = AttentionSizes(T, S, Hq, Hkv, size, 64)
                    return attend(emit, x["q"], k, v, x["length"], sizes, HALF), k, v
                own = emit.add(emit.array("token", np.arange(T, dtype=np.int32)[:, None]), x["length"])
                (seen,) = emit("", "LessOrEqual", [emit.positions(S), own], dtype=ir.DataType.BOOL)
                mask = emit("", "Reshape", [seen, emit.ints(1, 1, T, S)], dtype=ir.DataType.BOOL)[0]
                used = emit.add(at, emit.array("T", np.array([T], np.int64)))
                more = [None, None, used] if form == "nonpad" else []
                (y,) = emit("", "Attention", [x["q"], k, v, mask, *more], like=x["q"], scale=size**-0.5)
                return y, k, v

            for length in (64, 4096):
                yield Case(
                    f"attention T={T} {form} at {length} of {S}",
                    inputs,
                    body,
                    aliased={"out1": "k_cache", "out2": "v_cache"},
                    values={"length": torch.tensor([length], dtype=torch.int32)},
                )


def step_attention() -> Iterator[Case]:
    """One token, and a verify of four, over 4608 slots of a 0.8B and of the 35B-A3B: as two products, as parts of products, as sums."""
    S, size = 4096 + 512, 256
    forms: dict[str, Callable[..., ir.Value] | None] = {"products": attend, "parts": None, "sums": _attend_by_sums}
    for Hq, T in ((8, 1), (8, 4), (16, 1), (16, 4)):
        sizes = AttentionSizes(T, S, Hq, 2, size, 64)
        for form, attends in forms.items():
            inputs: Inputs = {
                "q": ((1, Hq, T, size), HALF),
                **dict.fromkeys("kv", ((1, 2, T, size), HALF)),
                **{f"{name}_cache": ((1, 2, S, size), HALF) for name in "kv"},
                "length": ((1,), I32),
            }
            again = {f"{name}_again": f"{name}_cache" for name in "kv"} if attends is None else {}
            inputs = {**inputs, **dict.fromkeys(again, ((1, 2, S, size), HALF))}

            def body(
                emit: Emitter, x: dict[str, ir.Value], sizes: AttentionSizes = sizes, attends: Callable[..., ir.Value] | None = attends
            ) -> Sequence[ir.Value]:
                if attends is None:
                    keys = Keys(x["k_again"], x["v_again"], x["k"], x["v"], x["length"])
                    y = emit.cast(attend_in_parts(emit, x["q"], keys, sizes, HALF), HALF)
                at = emit.cast(x["length"], I64)
                k, v = (emit("", "TensorScatter", [x[f"{n}_cache"], x[n], at], like=x[n], axis=-2)[0] for n in "kv")
                return (y if attends is None else attends(emit, x["q"], k, v, x["length"], sizes, HALF)), k, v

            yield Case(
                f"attention of {T}, {Hq} heads, as {form}",
                inputs,
                body,
                aliased={"out1": "k_cache", "out2": "v_cache", **again},
                values={"length": torch.tensor([2000], dtype=torch.int32)},
            )


def _attend_by_sums(
    emit: Emitter, q: ir.Value, k: ir.Value, v: ir.Value, length: ir.Value, sizes: AttentionSizes, activation: ir.DataType
) -> ir.Value:
    T, S, Hkv, D = sizes.T, sizes.S, sizes.Hkv, sizes.D
    rows, parts = sizes.Hq // Hkv * T, S // slots_of_a_part(S)

    def total(a: ir.Value, b: ir.Value, axis: int) -> ir.Value:
        return emit("", "ReduceSum", [emit.mul(emit.wide(a), emit.wide(b)), emit.ints(axis)], dtype=FLOAT, keepdims=0)[0]

    score = total(emit.reshape(k, 1, Hkv, 1, S, D), emit.reshape(q, 1, Hkv, rows, 1, D), -1)
    (w,) = emit("", "Softmax", [emit.add(score, causal_bias(emit, length, sizes))], like=score, axis=-1)
    o = total(emit.reshape(v, 1, Hkv, 1, parts, S // parts, D), emit.reshape(w, 1, Hkv, rows, parts, S // parts, 1), 4)
    (o,) = emit("", "ReduceSum", [o, emit.ints(3)], dtype=FLOAT, keepdims=0)
    heads = emit.reshape(emit.cast(o, activation), 1, sizes.Hq, T, D)
    return emit.reshape(emit.transpose(heads, 0, 2, 1, 3), 1, T, sizes.Hq * D)


# Products and logits


def products() -> Iterator[Case]:
    """A gated feed-forward of the 4B: three matrices of 2560 x 9216."""
    K, N = 2560, 9216
    for T in (1, 8, 512):
        for form in (
            "bound [N,K]",
            "bound [K,N]",
            "constant [N,K]",
            "bound int4 [N,K]",
            "bound int4 [K,N]",
            "constant int4 [K,N]",
            "bound int8 [N,K]",
            "bound int8 [K,N]",
            "bound fp8 [N,K]",
            "bound fp8 [K,N]",
        ):
            yield _feed_forward(T, K, N, form)


def _feed_forward(T: int, K: int, N: int, form: str) -> Case:
    """`form`: bound or constant, the element type unless fp16, and the layout of the weight."""
    bound, turned = form.startswith("bound"), form.endswith("[K,N]")
    kind = next((dtype for word, dtype in QUANTIZED.items() if word in form.split()), HALF)
    sizes = {"gate": (N, K), "up": (N, K), "down": (K, N)}
    blocks = kind != ir.DataType.FLOAT8E4M3FN

    def shapes(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows, columns = sizes[name]
        scale = (rows, columns // 128) if blocks else (rows,)
        return ((columns, rows), scale[::-1]) if turned else ((rows, columns), scale)

    inputs: dict[str, tuple[tuple[int, ...], ir.DataType]] = {"x": ((1, T, K), HALF)}
    for name in sizes if bound else ():
        inputs[name] = (shapes(name)[0], kind)
        if kind != HALF:
            inputs[f"{name}_scale"] = (shapes(name)[1], HALF)

    def constant(emit: Emitter, name: str) -> ir.Value:
        rng, shape = np.random.default_rng(0), shapes(name)[0]
        if kind == HALF:
            return emit.array(name, (rng.standard_normal(shape) * 0.02).astype(np.float16))
        packed = ir.tensor(rng.integers(-7, 7, shape, np.int8), dtype=kind, name=name)
        codes = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=packed)
        emit.graph.register_initializer(codes)
        return codes

    def body(emit: Emitter, x: dict[str, ir.Value]) -> Sequence[ir.Value]:
        def product(name: str, value: ir.Value) -> ir.Value:
            rows, columns = sizes[name]
            weight = x[name] if bound else constant(emit, name)
            if kind != HALF:
                scale = x[f"{name}_scale"] if bound else emit.array(f"{name}_scale", np.full(shapes(name)[1], 0.02, np.float16))
                attributes = {"axis": 0 if turned else 1, "block_size": 128} if blocks else {"axis": 1 if turned else 0}
                (weight,) = emit("", "DequantizeLinear", [weight, scale], like=value, **attributes)
            flat = emit.reshape(value, T, columns)
            y = emit.matmul(flat, weight) if turned else emit("", "Gemm", [flat, weight], like=value, transB=1)[0]
            return emit.reshape(y, 1, T, rows)

        gate, up = product("gate", x["x"]), product("up", x["x"])
        return [product("down", emit.mul(emit.mul(gate, emit.sigmoid(gate)), up))]

    return Case(f"feed-forward T={T} {form}", inputs, body)


def experts() -> Iterator[Case]:
    """Routed experts of the 35B-A3B: 256 of 512 x 2048, 8 for a token."""
    H, E, K, width = 2048, 256, 8, 512
    for T in (1, 4, 128, 512, 2048):
        inputs = {
            "x": ((1, T, H), HALF),
            "logits": ((1, T, E), HALF),
            "gate_up": ((E, 2 * width, H), HALF),
            "down": ((E, H, width), HALF),
        }

        def body(emit: Emitter, x: dict[str, ir.Value], T: int = T) -> Sequence[ir.Value]:
            return [emit_experts(emit, x["x"], x["logits"], x["gate_up"], x["down"], ExpertSizes(T, H, E, K, width))]

        yield Case(f"experts T={T}", inputs, body, check=_experts_in_torch)


def _experts_in_torch(x: dict[str, torch.Tensor], outputs: list[torch.Tensor]) -> str:
    rows = x["x"][0].float()
    weight, chosen = torch.topk(x["logits"][0].float().softmax(-1), 8)
    weight = weight / weight.sum(-1, keepdim=True)
    expected = torch.zeros_like(rows)
    for e in chosen.unique().tolist():
        token, slot = torch.where(chosen == e)
        gate, up = (rows[token] @ x["gate_up"][e].float().T).chunk(2, -1)
        expected.index_add_(0, token, (torch.nn.functional.silu(gate) * up @ x["down"][e].float().T) * weight[token, slot, None])
    return f"error {(outputs[0][0].float() - expected).abs().max() / expected.abs().max():.1e}"


def fp32() -> Iterator[Case]:
    """Whether products of fp32 operands are products of fp32 operands. Try NVIDIA_TF32_OVERRIDE=0 in the environment, too."""
    K, N = 1024, 1024
    for T in (1, 2, 4, 8, 64, 512):
        inputs = {"a": ((T, K), FLOAT), "b": ((K, N), FLOAT)}
        for name, emitter in (("", Emitter), (" in two parts", SplitEmitter)):
            for tf32 in (False, True):
                yield Case(
                    f"fp32 product T={T}{name}{' tf32 allowed' if tf32 else ''}",
                    inputs,
                    lambda emit, x: [emit.matmul(x["a"], x["b"])],
                    tf32,
                    check=lambda x, y: f"error {(y[0].double() - x['a'].double() @ x['b'].double()).abs().max() / y[0].abs().max():.1e}",
                    emitter=emitter,
                )


def top() -> Iterator[Case]:
    V = 248320
    for N in (1, 5):
        for group in (0, 1940, 3880, 7760):

            def body(emit: Emitter, x: dict[str, ir.Value], group: int = group, N: int = N) -> Sequence[ir.Value]:
                def top_k(y: ir.Value) -> tuple[ir.Value, ir.Value]:
                    values, ids = emit("", "TopK", [y, emit.ints(64)], 2, like=y, axis=-1)
                    ids.type = ir.TensorType(I64)
                    return values, ids

                if not group:
                    values, ids = top_k(x["x"])
                    return values, emit.cast(ids, I32)
                parts = V // group
                values, ids = top_k(emit.reshape(x["x"], 1, N, parts, group))
                base = emit.array(f"base_{group}", (np.arange(parts, dtype=np.int64) * group)[:, None])
                flat = emit.reshape(emit.add(ids, base), 1, N, parts * 64)
                values, chosen = top_k(emit.reshape(values, 1, N, parts * 64))
                return values, emit.cast(emit("", "GatherElements", [flat, chosen], like=flat, axis=2)[0], I32)

            yield Case(f"top 64 of {V}, N={N}, {'groups of ' + str(group) if group else 'one stage'}", {"x": ((1, N, V), FLOAT)}, body)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "decode": decode,
    "verify": verify,
    "prefill512": lambda: prefill(512),
    "prefill1024": lambda: prefill(1024),
    "prefill2048": lambda: prefill(2048),
    "prefill4096": lambda: prefill(4096),
    "attention": attention,
    "step_attention": step_attention,
    "products": products,
    "top": top,
    "experts": experts,
    "fp32": fp32,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="groups of variants, of: " + ", ".join(CASES))
    parser.add_argument("--flavour", default="tensorrt-rtx")
    parser.add_argument("--kernels", action="store_true", help="list the kernels of a call")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--build-only", metavar="SM", help="build for this compute capability, run nothing")
    arguments = parser.parse_args()
    library, rows = load_library(arguments.flavour), []
    print(f"{arguments.flavour} {library.version}", torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    for group in arguments.only.split(","):
        for case in CASES[group]():
            rows.append(_measured(library, case, arguments))
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))


def _measured(library: Library, case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        if arguments.build_only:
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as directory:
                path, options = Path(directory) / "engine", EngineOptions((arguments.build_only,), tf32=case.tf32)
                layers = build_engine(library, model_of(case), path, options, where=case.name).layers
                seconds, size = time.monotonic() - started, path.stat().st_size
                print(f"{case.name:60} built in {seconds:.1f} s, {size} bytes, {sum(layers.values())} layers")
            return {"name": case.name}
        engine = Engine(library, case, EngineOptions(tf32=case.tf32))
        engine.run()
        torch.cuda.synchronize()
        checked = case.check({n: engine.buffers[n] for n in case.inputs}, engine.outputs) if case.check else ""
        graph, eager = engine.measure()
    except Exception as error:
        print(f"{case.name:60} failed: {error}")
        return {"name": case.name, "error": str(error)}
    print(f"{case.name:60} {graph:8.4f} ms, launched {eager:8.4f} ms, built in {engine.build_s:5.1f} s  {checked}", flush=True)
    if arguments.kernels:
        print("\n".join(f"    {line}" for line in engine.kernels()), flush=True)
    return {"name": case.name, "ms": graph, "launched_ms": eager, "build_s": engine.build_s, "check": checked, "layers": engine.layers}


if __name__ == "__main__":
    main()
