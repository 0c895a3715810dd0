"""The kernels of FP8 matrices on a device, against float64, and bundles of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qwen_export import build
from qwen_export.graphs.e4m3 import E4M3_VALUES
from qwen_export.graphs.quantization.fp8_blocks import block_values
from qwen_export.runtimes import load
from qwen_export.runtimes.sampling.sampler import SamplingParams
from qwen_export.verification.logit_check import verify
from tests.support import quantizers
from tests.support.cuda_ops import LIMIT, OneOp, error, normalized, rounded, silu
from tests.support.family import tiny_config
from tests.support.quantizers import quantize_checkpoint
from tests.support.synthesize import synthesize
from tests.support.tiny_tokenizer import write_tiny_tokenizer

Array = npt.NDArray[Any]

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
RELEASE = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
FEW, MANY = (1, 2, 3, 4, 5, 6, 7, 8), (9, 16, 64, 300)
# From 9 rows on, on compute capability 9.0, products round activations to E4M3: 2.6 % of each, independent of each other.
ROUNDED_ACTIVATIONS = 0.04


class Fp8Weights:
    """A random matrix [N,K], or E of them: arbitrary codes, scales of both signs."""

    def __init__(self, N: int, K: int, rows: int, E: int = 0, seed: int = 0) -> None:
        rng = np.random.default_rng(N * 10000 + K + rows + seed)
        front = (E,) if E else ()
        finite = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
        codes, scales = rng.choice(finite, (*front, N, K)), rng.normal(size=(*front, -(-N // rows), -(-K // 128))) * 0.02 / K**0.5
        self.N, self.K, self.rows = N, K, rows
        self.codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -K % 16)])
        self.scales = np.pad(scales.astype(np.float32), [(0, 0)] * (codes.ndim - 1) + [(0, -scales.shape[-1] % 4)])
        each = np.repeat(scales.astype(np.float32), rows, axis=-2)[..., :N, :]
        self.values = block_values(codes, each).astype(np.float64)

    def inputs(self, name: str = "w") -> dict[str, tuple[Array, str]]:
        return {f"{name}_codes": (self.codes, "uint8"), f"{name}_scales": (self.scales, "float")}

    @property
    def attributes(self) -> dict[str, int]:
        return {"N": self.N, "K": self.K, "rows": self.rows}


def limit(dtype: str, M: int) -> float:
    return LIMIT[dtype] if M <= 8 else max(LIMIT[dtype] * 1.5, ROUNDED_ACTIVATIONS)


@DTYPES
@pytest.mark.parametrize(
    ("N", "K", "rows"), [(24, 40, 128), (37 * 8, 416, 8), (1024, 3584, 128), (8224, 1024, 32), (272, 4352, 1), (4096, 12288, 128)]
)
def test_linear(dtype: str, N: int, K: int, rows: int) -> None:
    w, rng = Fp8Weights(N, K, rows), np.random.default_rng(N + K)
    for extras in ("", "residual norm", "tail norm"):
        for M in (*FEW, *MANY):
            x, norm = rounded(rng.normal(size=(1, M, K)), dtype), rounded(1 + rng.normal(size=K) / 4, dtype)
            tail = rounded(rng.normal(size=(24, K)) / np.sqrt(K), dtype)
            width = N + 24 * ("tail" in extras)
            residual = rounded(rng.normal(size=(1, M, width)), dtype)
            given = {"residual": residual, "norm": norm, "tail": tail}
            optional = {name: (value, dtype) if name in extras else None for name, value in given.items()}
            inputs = {"x": (x, dtype)} | w.inputs() | optional
            op = OneOp("Fp8Linear", dtype, inputs, {"y": ((1, M, width), dtype)}, epsilon=1e-6, **w.attributes)
            h = normalized(x, norm, dtype) if "norm" in extras else x
            expected = h @ (np.concatenate([w.values, tail]) if "tail" in extras else w.values).T
            expected = expected + (residual if "residual" in extras else 0)
            assert error(op.run()["y"], expected) < limit(dtype, M), (N, K, M, extras)


@DTYPES
def test_many_rows_without_blocks_keep_their_activations(dtype: str) -> None:
    """Where fewer than 128 rows share a scale, weights are dequantized and activations are as they were."""
    w = Fp8Weights(256, 512, 64)
    for M in MANY:
        x = rounded(np.random.default_rng(M).normal(size=(1, M, w.K)), dtype)
        op = OneOp("Fp8Linear", dtype, {"x": (x, dtype)} | w.inputs(), {"y": ((1, M, w.N), dtype)}, epsilon=1e-6, **w.attributes)
        assert error(op.run()["y"], x @ w.values.T) < 1.5 * LIMIT[dtype], M


def test_many_rows_in_fp8_are_products_of_rounded_activations() -> None:
    """What is lost is the rounding of activations to E4M3 with a scale per 128 of a row: it is also in the reference here."""
    w, dtype = Fp8Weights(1024, 1536, 128), "float16"
    for M in MANY:
        x = rounded(np.random.default_rng(M).normal(size=(1, M, w.K)), dtype)
        op = OneOp("Fp8Linear", dtype, {"x": (x, dtype)} | w.inputs(), {"y": ((1, M, w.N), dtype)}, epsilon=1e-6, **w.attributes)
        got, exact = op.run()["y"], x @ w.values.T
        blocks = x.reshape(M, -1, 128).astype(np.float32)
        scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(448)
        codes = torch.from_numpy(blocks / scale).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        coded = (E4M3_VALUES[codes] * scale).reshape(M, -1).astype(np.float64) @ w.values.T
        kind = "exact" if error(got[0], exact[0]) < 2e-3 else "fp8"
        print(f"{M} rows: {kind}, {error(got[0], exact[0]):.2e} from exact, {error(got[0], coded):.2e} from rounded activations")
        assert kind == "exact" or error(got[0], coded) < 5e-3, M


@DTYPES
def test_swiglu(dtype: str) -> None:
    for N, K, rows in ((16, 40, 16), (336, 640, 16), (3584, 1024, 128)):
        w, rng = Fp8Weights(2 * N, K, rows), np.random.default_rng(N)
        for M in (*FEW, *MANY):
            x, norm = rounded(rng.normal(size=(1, M, K)), dtype), rounded(1 + rng.normal(size=K) / 4, dtype)
            inputs = {"x": (x, dtype)} | w.inputs() | {"norm": (norm, dtype)}
            op = OneOp("Fp8SwiGlu", dtype, inputs, {"y": ((1, M, N), dtype)}, epsilon=1e-6, **w.attributes)
            h = normalized(x, norm, dtype) @ w.values.T
            assert error(op.run()["y"], silu(h[..., :N]) * h[..., N:]) < 3 * limit(dtype, M), (N, K, M)


def test_gather() -> None:
    w, ids = Fp8Weights(100, 200, 4), np.array([[0, 99, 3, 17]])
    op = OneOp("Fp8Gather", "float16", {"ids": (ids, "int64")} | w.inputs(), {"y": ((1, 4, 200), "float16")}, **w.attributes)
    assert error(op.run()["y"], w.values[ids]) < 5e-4


@DTYPES
def test_rows_have_the_same_bits_alone_and_together(dtype: str) -> None:
    """Up to 8: drafts are verified with the sums that steps have."""
    for N, K in ((1024, 2560), (4096, 4096)):
        w = Fp8Weights(N, K, 128)
        x, norm = rounded(np.random.default_rng(1).normal(size=(1, 8, K)), dtype), np.ones(K)
        results = []
        for M in FEW:
            inputs = {"x": (x[:, :M], dtype)} | w.inputs() | {"residual": None, "norm": (norm, dtype)}
            op = OneOp("Fp8Linear", dtype, inputs, {"y": ((1, M, N), dtype)}, epsilon=1e-6, **w.attributes)
            results.append(op.run()["y"][0])
        assert all(np.array_equal(result, results[-1][: len(result)]) for result in results), (N, K)


def test_a_recorded_product_reads_its_inputs_again() -> None:
    w = Fp8Weights(4096, 1024, 128)
    for M in (1, 16):
        x = rounded(np.random.default_rng(2).normal(size=(1, M, 1024)), "float16")
        op = OneOp(
            "Fp8Linear", "float16", {"x": (x, "float16")} | w.inputs(), {"y": ((1, M, 4096), "float16")}, epsilon=0.0, **w.attributes
        )
        for result in op.replays():
            assert error(result["y"], x @ w.values.T) < limit("float16", M)


@DTYPES
@pytest.mark.parametrize("rows", [128, 16])
def test_experts(dtype: str, rows: int) -> None:
    for E, K, H, inner in ((16, 4, 64, 32), (64, 8, 512, 128), (32, 8, 272, 48)):
        up, down = Fp8Weights(2 * inner, H, rows, E), Fp8Weights(H, inner, rows, E, seed=1)
        rng = np.random.default_rng(E)
        for M in (1, 3, 8, 9, 40, 1030) if E == 16 else (1, 8, 9, 100):
            x, logits = rounded(rng.normal(size=(1, M, H)), dtype), rounded(rng.normal(size=(1, M, E)) * 2, dtype)
            expected = np.zeros((M, H))
            for m in range(M):
                chosen = np.argsort(-logits[0, m], kind="stable")[:K]
                share = np.exp(logits[0, m, chosen] - logits[0, m].max())
                for e, weight in zip(chosen, share / share.sum(), strict=True):
                    h = up.values[e] @ x[0, m]
                    expected[m] += weight * (down.values[e] @ rounded(silu(h[:inner]) * h[inner:], dtype))
            inputs = {"x": (x, dtype), "logits": (logits, dtype)} | up.inputs("gate_up") | down.inputs("down")
            attributes = {"top_k": K, "inner": inner, "gate_up_rows": rows, "down_rows": rows}
            op = OneOp("Fp8Moe", dtype, inputs, {"y": ((1, M, H), dtype)}, **attributes)
            for _ in range(2):
                assert error(op.run()["y"][0], expected) < 2 * LIMIT[dtype], (E, K, M)


# ---- bundles ----


@pytest.mark.parametrize("released", [True, False], ids=["release", "made"])
def test_a_tiny_bundle_computes_what_its_codes_say(tmp_path: Path, released: bool) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
    checkpoint = synthesize(tiny_config(vision=False, **sizes), tmp_path / "c", tokenizer=write_tiny_tokenizer(tmp_path / "tokenizer"))
    if released:
        checkpoint = quantize_checkpoint(checkpoint, tmp_path / "release", quantizers.block_fp8(), RELEASE).path
    bundle = build(checkpoint, tmp_path / "bundle", device="cuda", precision="fp8", max_context=128)
    result = verify(bundle, checkpoint)
    assert result["passed"], "\n".join(map(str, result["checks"]))


def test_the_demo_of_experts(demo_moe_checkpoint: Path, tmp_path: Path) -> None:
    bundle = build(demo_moe_checkpoint, tmp_path / "bundle", device="cuda", precision="fp8", max_context=256)
    result = verify(bundle, demo_moe_checkpoint)
    assert result["passed"], result


def test_drafts_change_no_token(demo_checkpoint: Path, tmp_path: Path) -> None:
    bundle = build(demo_checkpoint, tmp_path / "bundle", device="cuda", precision="fp8", max_context=256)
    result = verify(bundle, demo_checkpoint)
    assert result["passed"], result
    texts = []
    for speculate in ("off", 1, 3):
        model = load(bundle, speculate=speculate)
        texts.append("".join(model.complete("import os\n\n\ndef read(", sampling=SamplingParams(temperature=0), max_new_tokens=48)))
        model.close()
    assert texts == texts[:1] * 3
