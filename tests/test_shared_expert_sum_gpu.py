"""The kernels around the experts of a mixture layer against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.cuda_ops import LIMIT, Array, OneOp, error, rounded

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def terms(dtype: str, rows: int, H: int) -> dict[str, Array]:
    chance = np.random.default_rng(rows + H)
    made = {name: rounded(chance.standard_normal((1, rows, H)), dtype) for name in ("experts", "shared", "x", "residual")}
    return made | {"gate": rounded(chance.standard_normal((1, H)) / np.sqrt(H), dtype)}


def added(experts: Array, shared: Array, x: Array, gate: Array, residual: Array | None) -> Array:
    """In float64."""
    return experts + shared / (1 + np.exp(-(x @ gate.T))) + (0 if residual is None else residual)


def op(dtype: str, given: dict[str, Array], with_residual: bool) -> OneOp:
    names = ("experts", "shared", "x", "gate", *(["residual"] if with_residual else []))
    return OneOp("SharedExpertSum", dtype, {name: (given[name], dtype) for name in names}, {"y": (given["x"].shape, dtype)})


@DTYPES
@pytest.mark.parametrize("H", [8, 264, 2048, 4096, 9000])
@pytest.mark.parametrize("rows", [1, 3, 8, 100])
@pytest.mark.parametrize("with_residual", [True, False])
def test_the_sum(dtype: str, H: int, rows: int, with_residual: bool) -> None:
    """One rounding. A thread has one pack of a row or, with 9000 values, more; blocks have 32 to 1024 threads."""
    given = terms(dtype, rows, H)
    got = op(dtype, given, with_residual).run()["y"]
    expected = added(**given | ({} if with_residual else {"residual": None}))
    assert error(got, expected) < LIMIT[dtype] / 2
    spacing = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype] * np.exp2(np.floor(np.log2(np.abs(expected).clip(2.0**-4))))
    assert (np.abs(got - expected) <= 0.51 * spacing + 2e-6).all(), "more than the one rounding"


@DTYPES
def test_a_row_has_the_same_bits_in_any_company(dtype: str) -> None:
    given = terms(dtype, 100, 2048)
    whole = op(dtype, given, True).run()["y"]
    for row in (0, 57, 99):
        alone = {name: value if name == "gate" else value[:, row : row + 1] for name, value in given.items()}
        assert np.array_equal(op(dtype, alone, True).run()["y"][:, 0], whole[:, row])


@DTYPES
def test_gates_that_are_open_or_closed(dtype: str) -> None:
    """exp of a large sum overflows to infinity: the gate is 0 then, and no NaN."""
    given = terms(dtype, 2, 64)
    given["gate"] = np.full((1, 64), 16.0)
    given["x"] = np.stack([np.full((1, 64), 8.0), np.full((1, 64), -8.0)], axis=1).reshape(1, 2, 64)
    got = op(dtype, given, False).run()["y"]
    expected = np.stack([given["experts"][:, 0] + given["shared"][:, 0], given["experts"][:, 1]], axis=1)
    assert error(got, expected) < LIMIT[dtype]


@DTYPES
def test_a_recorded_sum_reads_its_inputs_again(dtype: str) -> None:
    given = terms(dtype, 1, 2048)
    expected = added(**given)
    for run in op(dtype, given, True).replays():
        assert error(run["y"], expected) < LIMIT[dtype]


@DTYPES
@pytest.mark.parametrize(("rows", "K"), [(1, 8), (1, 2048), (8, 264), (100, 5120)])
def test_the_norm(dtype: str, rows: int, K: int) -> None:
    chance = np.random.default_rng(K)
    x, weight = rounded(3 * chance.standard_normal((1, rows, K)), dtype), rounded(chance.standard_normal(K), dtype)
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight
    inputs = {"x": (x, dtype), "weight": (weight, dtype)}
    assert error(OneOp("RmsNorm", dtype, inputs, {"y": (x.shape, dtype)}, epsilon=1e-6).run()["y"], expected) < LIMIT[dtype]
