"""Device time of the pieces that TensorRT engines are made of: the gated delta rule, attention over a cache, products, top-k.

    python -m benchmarks.tensorrt_recurrence [--only prefill,decode,...] [--flavour tensorrt-rtx] [--kernels] [--json FILE]

Builds one small engine per variant for the GPU that is there, replays it as a CUDA graph and prints milliseconds per call: the median of
several runs. Shapes are those of the 35B-A3B: 16 key and 32 value heads of 128 for the recurrence. `--kernels` lists what a call
launches. Results of the recurrence are compared with the same in float64. Needs torch with CUDA, onnx, onnx_ir.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from benchmarks.engine_piece import BF16, FLOAT, HALF, I32, I64, Case, Engine, Inputs, model_of
from benchmarks.recurrence_case import one_after_the_other, recurrence
from qwen_export.engine_options import EngineOptions
from qwen_export.plugins.decompose.batched_chunks import batched_chunks
from qwen_export.plugins.decompose.decompose_attention import AttentionSizes, attend, causal_bias
from qwen_export.plugins.decompose.delta_rule import delta_rule
from qwen_export.plugins.decompose.reduced_step import reduced_step
from qwen_export.plugins.decompose.split_product import SplitEmitter
from qwen_export.plugins.decompose.summed_product import SummedEmitter
from qwen_export.plugins.emitter import Emitter
from qwen_export.plugins.tensorrt.attend_in_parts import Keys, attend_in_parts, slots_of_a_part
from qwen_export.plugins.tensorrt.build_engine import build_engine
from qwen_export.plugins.tensorrt.tensorrt_experts import ExpertSizes, emit_experts
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import Library, load_library

QUANTIZED = {"int4": ir.DataType.INT4, "int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


# The recurrence


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
