"""int4 and int8 weights on CUDA: what the build makes of them, and each kernel against float64 on a device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.lower_graphs import lower
from qwen_export.errors import ConfigError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.quantization.packing import QuantFormat, dequantize, pack
from qwen_export.plugins.native.native_library import LIBRARIES
from qwen_export.plugins.onnxruntime.chain_steps import expand_chains
from qwen_export.runtimes.memory.cuda_driver import compute_capability
from qwen_export.verification.logit_check import verify
from tests.support.cuda_ops import LIMIT, OneOp, error, normalized, rounded, silu
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize

Array = npt.NDArray[Any]
VARIABLE = LIBRARIES["cuda"].variable


# ---- what the build makes of it; needs no device ----


def experts_config() -> dict[str, Any]:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 16}
    return tiny_config(moe=True, vision=False, linear_key_head_dim=64, linear_value_head_dim=64, num_experts_per_tok=4, **sizes)


def lowered(checkpoint: Path, precision: str, plan_file: Path | None = None) -> Any:
    source = open_checkpoint(checkpoint)
    graph = lower(source, plan_build(source, "onnxruntime", "cuda", precision, plan_file=plan_file))["decoder"].graph
    expand_chains(graph)
    return graph


@pytest.mark.usefixtures("fake_library")
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_a_delta_net_layer_is_five_launches_still(wide_heads: Path, precision: str) -> None:
    """in_proj_a and in_proj_b, which stay fp16, are the tail of the product that is quantized."""
    graph = lowered(wide_heads, precision)
    counts = Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in graph)
    linear, attention = 3, 1
    assert counts["qwen.native.QuantLinear"] == 3 * (linear + attention) + 1
    assert counts["qwen.native.QuantSwiGlu"] == linear + attention and counts["qwen.native.QuantGather"] == 1
    assert not {"qwen.native.Linear", "qwen.native.SwiGlu", "Concat", "Add"} & set(counts)
    tails = [node.inputs[4] for node in graph if node.op_type == "QuantLinear" and len(node.inputs) > 4 and node.inputs[4] is not None]
    assert len(tails) == linear and {value.dtype.name for value in tails} == {"FLOAT16"}
    assert {value.dtype.name for value in graph.outputs if value.name.startswith("layers.")} == {"FLOAT16", "FLOAT"}


@pytest.mark.usefixtures("fake_library")
def test_experts(tmp_path: Path) -> None:
    checkpoint = synthesize(experts_config(), tmp_path / "moe")
    counts = Counter(node.op_type for node in lowered(checkpoint, "int4"))
    assert counts["QuantMixture"] == 4 and counts["MoE"] == 0
    plan = tmp_path / "plan.toml"
    plan.write_text('[experts]\nformat = "stored"')
    counts = Counter(node.op_type for node in lowered(checkpoint, "int4", plan))
    assert counts["QuantMixture"] == counts["QuantMoe"] == 0 and counts["MoE"] == 4
    plan.write_text('[matrices]\n"layers.1.mlp.experts.*" = { format = "stored" }')
    with pytest.raises(ConfigError, match="experts of every layer"):
        lowered(checkpoint, "int4", plan)


def test_what_cannot_be_quantized(tmp_path: Path, wide_heads: Path, fake_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = synthesize(tiny_config(vision=False, intermediate_size=88), tmp_path / "odd")
    with pytest.raises(UnsupportedError, match="multiples of 16, and this model has intermediate size 88"):
        plan_build(open_checkpoint(odd), device="cuda", precision="int4")
    wide = synthesize(tiny_config(vision=False, vocab_size=509), tmp_path / "vocabulary")
    with pytest.raises(UnsupportedError, match="int4: the native products need multiples of 8, and this model has vocabulary 509"):
        plan_build(open_checkpoint(wide), device="cuda", precision="int4")
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(UnsupportedError, match=r"int4 needs the library of native kernels: run `sh .*native/build\.sh"):
        plan_build(open_checkpoint(wide_heads), device="cuda", precision="int4")


# ---- the kernels ----

gpu = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
FORMATS = [
    QuantFormat(4, 32),
    QuantFormat(4, 64, zeros=True),
    QuantFormat(4, 128),
    QuantFormat(4, 128, zeros=True, wide_scales=True),
    QuantFormat(8, 32),
    QuantFormat(8, 128, zeros=True),
    QuantFormat(8, 64, wide_scales=True),
]
EVERY = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f.bits}-{f.block}{'z' * f.zeros}{'w' * f.wide_scales}")
ROWS = [1, 2, 5, 8, 9, 33]


def random_matrix(format: QuantFormat, N: int, K: int, seed: int = 0) -> tuple[Array, Array]:
    """A packed matrix of arbitrary codes, scales of both signs and zeros, and what it stands for."""
    rng = np.random.default_rng(N * 10000 + K + seed)
    blocks, top = format.blocks(K), 1 << format.bits
    codes = rng.integers(0, top, (N, K)).astype(np.uint8)
    scales = (rng.normal(size=(N, blocks)) * 3 / K**0.5 / top).astype(format.scale_dtype)
    zeros = rng.integers(0, top, (N, blocks)).astype(np.uint8) if format.zeros else None
    return pack(format, codes, scales, zeros), dequantize(format, codes, scales, zeros).astype(np.float64)


@gpu
@DTYPES
@EVERY
@pytest.mark.parametrize(("N", "K"), [(24, 40), (37 * 8, 416), (1024, 3584), (8224, 1024), (8208, 1280)])
def test_quant_linear(dtype: str, format: QuantFormat, N: int, K: int) -> None:
    rng = np.random.default_rng(N + K)
    packed, w = random_matrix(format, N, K)
    for extras in ("", "residual norm", "tail norm"):
        for M in ROWS:
            x, norm = rounded(rng.normal(size=(1, M, K)), dtype), rounded(1 + rng.normal(size=K) / 4, dtype)
            tail = rounded(rng.normal(size=(24, K)) / np.sqrt(K), dtype)
            width = N + 24 * ("tail" in extras)
            residual = rounded(rng.normal(size=(1, M, width)), dtype)
            given = {"residual": residual, "norm": norm, "tail": tail}
            optional = {name: (value, dtype) if name in extras else None for name, value in given.items()}
            inputs = {"x": (x, dtype), "w": (packed, "uint8")} | optional
            op = OneOp("QuantLinear", dtype, inputs, {"y": ((1, M, width), dtype)}, epsilon=1e-6, **format.attributes(N, K))
            h = normalized(x, norm, dtype) if "norm" in extras else x
            expected = h @ (np.concatenate([w, tail]) if "tail" in extras else w).T + (residual if "residual" in extras else 0)
            # More rows go through weights of the element type.
            assert error(op.run()["y"], expected) < LIMIT[dtype] * (1 if M <= 8 else 1.5), (format, N, K, M, extras)


@gpu
@DTYPES
@EVERY
@pytest.mark.parametrize(("N", "K"), [(37 * 8, 416), (1024, 3584)])
def test_products_of_many_rows(dtype: str, format: QuantFormat, N: int, K: int) -> None:
    """Rows on both sides of each border between kernels; products with all that they can have, SwiGlu without a norm."""
    rng = np.random.default_rng(N)
    packed, w = random_matrix(format, N, K)
    both, gates = random_matrix(format, 2 * N // 32 * 32, K)
    half = len(gates) // 2
    for M in (16, 17, 64, 65, 128, 129, 260, 600):
        x, norm = rounded(rng.normal(size=(1, M, K)), dtype), rounded(1 + rng.normal(size=K) / 4, dtype)
        tail, residual = rounded(rng.normal(size=(24, K)) / np.sqrt(K), dtype), rounded(rng.normal(size=(1, M, N + 24)), dtype)
        given = {"x": (x, dtype), "w": (packed, "uint8"), "residual": (residual, dtype), "norm": (norm, dtype), "tail": (tail, dtype)}
        op = OneOp("QuantLinear", dtype, given, {"y": ((1, M, N + 24), dtype)}, epsilon=1e-6, **format.attributes(N, K))
        h = normalized(x, norm, dtype)
        assert error(op.run()["y"], h @ np.concatenate([w, tail]).T + residual) < 1.5 * LIMIT[dtype], (format, M)
        gate = OneOp(
            "QuantSwiGlu",
            dtype,
            {"x": (x, dtype), "w": (both, "uint8")},
            {"y": ((1, M, half), dtype)},
            epsilon=0.0,
            **format.attributes(2 * half, K),
        )
        up = x @ gates.T
        assert error(gate.run()["y"], silu(up[..., :half]) * up[..., half:]) < 3 * LIMIT[dtype], (format, M)


@gpu
@pytest.mark.parametrize(("N", "K", "M"), [(8192, 640, 400), (8192, 640, 450), (4096, 2048, 350), (5120, 1024, 600)])
def test_prompts_of_large_matrices(N: int, K: int, M: int) -> None:
    """Of more weights than a copy pays for: tiles of all widths, with and without a share of K for several blocks."""
    rng, dtype = np.random.default_rng(M), "float16"
    format = QuantFormat(4, 32)
    packed, w = random_matrix(format, N, K)
    x, norm = rounded(rng.normal(size=(1, M, K)), dtype), rounded(1 + rng.normal(size=K) / 4, dtype)
    tail, residual = rounded(rng.normal(size=(24, K)) / np.sqrt(K), dtype), rounded(rng.normal(size=(1, M, N + 24)), dtype)
    given = {"x": (x, dtype), "w": (packed, "uint8"), "residual": (residual, dtype), "norm": (norm, dtype), "tail": (tail, dtype)}
    op = OneOp("QuantLinear", dtype, given, {"y": ((1, M, N + 24), dtype)}, epsilon=1e-6, **format.attributes(N, K))
    expected = normalized(x, norm, dtype) @ np.concatenate([w, tail]).T + residual
    assert error(op.run()["y"], expected) < 1.5 * LIMIT[dtype]


@gpu
@DTYPES
@EVERY
def test_quant_swiglu(dtype: str, format: QuantFormat) -> None:
    for N, K in ((16, 40), (3584, 1024)):
        rng = np.random.default_rng(N)
        packed, w = random_matrix(format, 2 * N, K)
        for M in ROWS:
            x, norm = rounded(rng.normal(size=(1, M, K)), dtype), rounded(1 + rng.normal(size=K) / 4, dtype)
            inputs = {"x": (x, dtype), "w": (packed, "uint8"), "norm": (norm, dtype)}
            op = OneOp("QuantSwiGlu", dtype, inputs, {"y": ((1, M, N), dtype)}, epsilon=1e-6, **format.attributes(2 * N, K))
            h = normalized(x, norm, dtype) @ w.T
            assert error(op.run()["y"], silu(h[..., :N]) * h[..., N:]) < 3 * LIMIT[dtype], (format, N, K, M)


@gpu
@EVERY
def test_quant_gather(format: QuantFormat) -> None:
    packed, w = random_matrix(format, 100, 200)
    ids = np.array([[0, 99, 3, 17]])
    op = OneOp(
        "QuantGather",
        "float16",
        {"ids": (ids, "int64"), "w": (packed, "uint8")},
        {"y": ((1, 4, 200), "float16")},
        **format.attributes(100, 200),
    )
    assert error(op.run()["y"], w[ids]) < 5e-4


@gpu
@DTYPES
@pytest.mark.parametrize(("N", "K"), [(1024, 2560), (2560, 1024), (8208, 1280)])
def test_rows_have_the_same_bits_alone_and_together(dtype: str, N: int, K: int) -> None:
    """Up to 8: drafts are verified with the sums that steps have. More: wherever their weights are not copied for a call."""
    ranges: list[list[int]] = [list(range(1, 9))]
    if compute_capability()[0] == 9:
        ranges += [[9, 16, 31, 64], [65, 100, 128], [129, 200, 256]]
    for format in FORMATS:
        packed, _ = random_matrix(format, N, K)
        x, norm = rounded(np.random.default_rng(1).normal(size=(1, 256, K)), dtype), np.ones(K)
        for rows in ranges:
            results = []
            for M in rows:
                inputs = {"x": (x[:, :M], dtype), "w": (packed, "uint8"), "residual": None, "norm": (norm, dtype)}
                op = OneOp("QuantLinear", dtype, inputs, {"y": ((1, M, N), dtype)}, epsilon=1e-6, **format.attributes(N, K))
                results.append(op.run()["y"][0])
            assert all(np.array_equal(result, results[-1][: len(result)]) for result in results), format


@gpu
def test_a_recorded_product_reads_its_inputs_again() -> None:
    format, (N, K) = FORMATS[0], (4096, 1024)
    packed, w = random_matrix(format, N, K)
    x = rounded(np.random.default_rng(2).normal(size=(1, 1, K)), "float16")
    op = OneOp(
        "QuantLinear",
        "float16",
        {"x": (x, "float16"), "w": (packed, "uint8")},
        {"y": ((1, 1, N), "float16")},
        epsilon=0.0,
        **format.attributes(N, K),
    )
    for result in op.replays():
        assert error(result["y"], x @ w.T) < LIMIT["float16"]


@gpu
@DTYPES
@pytest.mark.parametrize("formats", [(0, 0), (2, 2), (3, 5), (4, 4)], ids=str)
def test_quant_moe(dtype: str, formats: tuple[int, int]) -> None:
    gate_up, down = (FORMATS[i] for i in formats)
    for E, K, H, inner in ((16, 4, 64, 32), (64, 8, 512, 128), (256, 8, 256, 48)):
        ups, up = zip(*(random_matrix(gate_up, 2 * inner, H, seed) for seed in range(E)), strict=True)
        downs, back = zip(*(random_matrix(down, H, inner, seed) for seed in range(E)), strict=True)
        attributes: dict[str, Any] = {"top_k": K, "inner": inner}
        for prefix, format in (("gate_up", gate_up), ("down", down)):
            attributes |= {f"{prefix}_{n}": format.attributes(0, 0)[n] for n in ("bits", "block", "zeros", "wide_scales")}
        rng = np.random.default_rng(E)
        for M in (1, 3, 8, 9, 40, 1030) if E == 16 else (1, 8, 100, 300):
            x, logits = rounded(rng.normal(size=(1, M, H)), dtype), rounded(rng.normal(size=(1, M, E)) * 2, dtype)
            expected = np.zeros((M, H))
            for m in range(M):
                chosen = np.argsort(-logits[0, m], kind="stable")[:K]
                share = np.exp(logits[0, m, chosen] - logits[0, m].max())
                for e, weight in zip(chosen, share / share.sum(), strict=True):
                    h = up[e] @ x[0, m]
                    expected[m] += weight * (back[e] @ rounded(silu(h[:inner]) * h[inner:], dtype))
            inputs = {
                "x": (x, dtype),
                "logits": (logits, dtype),
                "gate_up": (np.stack(ups), "uint8"),
                "down": (np.stack(downs), "uint8"),
            }
            op = OneOp("QuantMoe", dtype, inputs, {"y": ((1, M, H), dtype)}, **attributes)
            for _ in range(2):
                assert error(op.run()["y"][0], expected) < 2 * LIMIT[dtype], (E, K, M)


@gpu
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_demo_in_int4_and_int8(demo_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    bundle = build(demo_checkpoint, tmp_path / "bundle", device="cuda", precision=precision, max_context=256)
    result = verify(bundle, demo_checkpoint)
    assert result["passed"], result


@gpu
def test_the_demo_of_experts_in_int4(demo_moe_checkpoint: Path, tmp_path: Path) -> None:
    bundle = build(demo_moe_checkpoint, tmp_path / "bundle", device="cuda", precision="int4", max_context=256)
    result = verify(bundle, demo_moe_checkpoint)
    assert result["passed"], result
