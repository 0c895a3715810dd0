"""The delta rule in chunks, in turn and all of a call at once, and one token as sums, against float64 token by token."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_export.errors import UnsupportedError
from qwen_export.plugins.decompose.batched_chunks import batched_chunks
from qwen_export.plugins.decompose.chunks_in_turn import in_chunks
from qwen_export.plugins.decompose.delta_rule import DeltaRule, Recurrence
from qwen_export.plugins.decompose.reduced_step import reduced_step
from tests.support.standard_graphs import emitted, session
from tests.test_portable_numerics import DECAYS, FLOAT, Array, correlated_keys, recurrence

NAMES = ("q", "k", "v", "g", "beta")


def prompt(seed: int, H: int, L: int, D: int, decay: str) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    k = np.stack([correlated_keys(rng, L, D, 0.7) for _ in range(H)])
    q = correlated_keys(rng, H * L, D, 0.7).reshape(H, L, D) * D**-0.5
    rest = {"v": rng.standard_normal((H, L, D)), "g": DECAYS[decay](rng, (H, L)), "beta": rng.uniform(0.5, 1, (H, L))}
    return {name: np.asarray(x, np.float32) for name, x in ({"q": q, "k": k} | rest).items()}


def read(rule: DeltaRule, data: dict[str, Array], T: int) -> tuple[Array, Array]:
    """The whole prompt in calls of T tokens: o [H,L,D] and the last state [H,D,D]."""
    H, L, D = data["v"].shape
    wide = data | {name: data[name][..., None] for name in ("g", "beta")}
    shapes = {name: ((1, H, T, x.shape[-1]), FLOAT) for name, x in wide.items()} | {"state": ((1, H, D, D), FLOAT)}
    run = session(emitted(shapes, lambda emit, x: rule(emit, Recurrence(**x, length=T))))
    state, out = np.zeros((1, H, D, D), np.float32), []
    for start in range(0, L, T):
        o, state = run.run(None, {n: x[None, :, start : start + T] for n, x in wide.items()} | {"state": state})
        out.append(o[0])
    return np.concatenate(out, axis=1), state[0]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    ("rule", "T", "L"),
    [
        (batched_chunks(64), 512, 4096),
        (batched_chunks(32), 128, 1024),
        (reduced_step, 1, 512),
        (in_chunks(32), 256, 4096),
        (in_chunks(64), 160, 1600),  # the last chunk of a call is a shorter one
        (in_chunks(24), 96, 960),  # 24 rows are not 2, 4, 8 blocks
    ],
)
def test_against_float64(rule: DeltaRule, T: int, L: int, decay: str) -> None:
    data = prompt(len(decay), 2, L, 32, decay)
    o, state = read(rule, data, T)
    expected, expected_state = recurrence(*(data[n] for n in NAMES), np.zeros_like(state))
    scale = max(1, np.abs(expected_state).max())
    assert np.abs(o - expected).max() <= 2e-5 * scale
    assert np.abs(state - expected_state).max() <= 2e-5 * scale


@pytest.mark.parametrize("rule", [batched_chunks(64), in_chunks(32), in_chunks(48)])
def test_padding_leaves_no_trace(rule: DeltaRule) -> None:
    data = prompt(3, 2, 256, 16, "usual")
    H, L, D = data["v"].shape
    wide = data | {name: data[name][..., None] for name in ("g", "beta")}
    shapes = {name: ((1, H, L, x.shape[-1]), FLOAT) for name, x in wide.items()} | {
        "state": ((1, H, D, D), FLOAT),
        "keep": ((1, 1, L, 1), FLOAT),
    }
    run = session(emitted(shapes, lambda emit, x: rule(emit, Recurrence(**x, length=L))))
    feeds = {n: x[None] for n, x in wide.items()} | {"state": np.zeros((1, H, D, D), np.float32)}
    for count in (1, 64, 100, 255):
        keep = (np.arange(L) < count).astype(np.float32)[None, None, :, None]
        o, state = run.run(None, feeds | {"keep": keep})
        expected, expected_state = recurrence(*(data[n][:, :count] for n in NAMES), np.zeros((H, D, D)))
        assert np.abs(o[0][:, :count] - expected).max() <= 2e-5
        assert np.abs(state[0] - expected_state).max() <= 2e-5


def test_a_call_is_whole_chunks() -> None:
    with pytest.raises(UnsupportedError, match="whole number of chunks"):
        read(batched_chunks(32), prompt(0, 1, 96, 8, "usual"), 48)
