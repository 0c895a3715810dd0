"""gated_delta_net without the plugin: batches whose sequences have counts of their own, against the eager op in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import builtin_delta_net as builtin
from tests.support import cpu_delta_net as op
from tests.support.cpu_delta_net import Array, Case, Shape, make_case

SHAPES = (Shape(), Shape(Hk=1, ratio=3, Dk=32, Dv=16, K=3), Shape(ratio=2, Dk=64, Dv=64))
TOLERANCE = 1e-5
"""Of the largest value."""


@st.composite
def batches(draw: st.DrawFn) -> Case:
    B, T, P = draw(st.integers(1, 5)), draw(st.integers(1, 9) | st.just(70)), draw(st.integers(0, 9))
    accepted = [draw(st.integers(0, P)) for _ in range(B)]
    commit = [draw(st.sampled_from([0, T]) | st.integers(0, T)) for _ in range(B)]
    return make_case(draw(st.sampled_from(SHAPES)), B, T, P, accepted, commit, seed=0)


def check(case: Case) -> dict[str, Array]:
    wanted, got = op.expected(case), builtin.call(case)
    for name, value in got.items():
        expected = wanted[name].astype(np.float32)
        if name == "y":
            value, expected = op.specified(case, value), op.specified(case, expected)
        assert op.error(value, expected) < TOLERANCE, name
    return got


@settings(max_examples=60, deadline=None)
@given(case=batches())
def test_each_sequence_has_its_own_counts(case: Case) -> None:
    """Pending rows that were not accepted are NaN; states are updated in place."""
    check(case)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(shape: Shape) -> None:
    accepted, commit = [4, 0, 2, 0, 1], [3, 0, 0, 3, 1]
    batch = make_case(shape, 5, 3, 4, accepted, commit, seed=1)
    got = check(batch)
    for b in range(5):
        sliced = {name: batch.tensors[name][b : b + 1] for name in ("qkvz", "ab", "conv_history", "state", *op.TRANSACTION)}
        alone = builtin.call(batch.replaced(**sliced))
        shown = commit[b] or None
        assert np.array_equal(got["y"][b, :shown], alone["y"][0, :shown]), b
        for name in ("conv_history_out", "state_out"):
            assert np.array_equal(got[name][b], alone[name][0]), (b, name)


def test_an_idle_sequence_keeps_its_state() -> None:
    """Neither accepted nor committed: the state is the same to the bit, beside sequences that read."""
    case = make_case(Shape(), 3, 2, 5, [0, 5, 3], [0, 2, 0], seed=2)
    got = check(case)
    assert np.array_equal(got["state_out"][0], case.tensors["state"][0])
    assert np.array_equal(got["conv_history_out"][0], case.tensors["conv_history"][0])
