"""GatedAttention of the CPU plugin: against the eager op in float64, and the same bits however tokens are brought to it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_export.plugins.native.native_library import find_library
from tests.support import cpu_attention as op
from tests.support.cpu_attention import Case, Shape, make_case
from tests.support.instruction_sets import check_in_instruction_set
from tests.support.kernel_families import needs_plugin

ROOT = Path(__file__).parent.parent
SHORT = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
pytestmark = needs_plugin


@pytest.fixture(scope="module")
def library() -> str:
    return str(find_library("cpu"))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    D = draw(st.sampled_from([8, 16, 20, 32, 64]))
    shape = Shape(Hkv=draw(st.integers(1, 3)), group=draw(st.sampled_from([1, 2, 4, 6, 8])), D=D, half=draw(st.integers(1, D // 2)))
    lengths = draw(st.lists(st.integers(0, 20) | st.integers(240, 270) | st.integers(0, 700), min_size=1, max_size=4))
    return make_case(
        shape,
        lengths,
        draw(st.integers(1, 9) | st.integers(20, 80)),
        seed=draw(st.integers(0, 1000)),
        sharp=draw(st.sampled_from([0.1, 1.0, 30.0])),
        spare=draw(st.integers(0, 5)),
        kept=draw(st.sampled_from(["fp32", "fp32", *op.ROUNDED])),
    )


@SHORT
@given(case=cases())
def test_attention_is_what_the_eager_op_says(library: str, case: Case) -> None:
    """Sequences with pasts of their own; in place too, with NaN in every slot behind a text, and in y before the call."""
    op.check_case(library, case)


@pytest.mark.parametrize("shape", [op.SHAPES[0], op.SHAPES[2], Shape(Hkv=2, group=4, D=256, half=32)], ids=str)
@pytest.mark.parametrize(("length", "T"), [(0, 20), (250, 20), (1000, 60)])
def test_the_bits_of_a_token_do_not_depend_on_its_call(library: str, shape: Shape, length: int, T: int) -> None:
    op.check_bits(library, shape, length, T)


@pytest.mark.parametrize("kept", list(op.ROUNDED))
def test_what_a_cache_keeps_does_not_depend_on_the_call(library: str, kept: str) -> None:
    """Steps, drafts and prompts write the same bytes, and read the same values."""
    for D in (20, 256):
        op.check_bits(library, Shape(Hkv=2, group=4, D=D, half=8), 250, 20, kept)


def test_sequences_of_a_call_do_not_see_each_other(library: str) -> None:
    """The same bits as alone, whatever the lengths of the others."""
    batch = make_case(Shape(), [700, 0, 31, 256], 7)
    together = op.call(library, batch)
    for b in range(4):
        alone = op.call(library, batch.row(b))
        for name in op.OUTPUTS:
            assert np.array_equal(together[name][b], alone[name][0], equal_nan=True), (b, name)


@pytest.mark.parametrize(("lengths", "T"), [([2000, 3], 1), ([1500], 300)])
def test_threads_do_not_change_bits(library: str, lengths: list[int], T: int) -> None:
    """Neither where blocks of the cache are shared among threads, nor where tokens are."""
    case = make_case(Shape(), lengths, T)
    for name, value in op.call(library, case, threads=1).items():
        assert np.array_equal(value, op.call(library, case, threads=2)[name], equal_nan=True), name


def test_padding_behind_a_sequence_changes_nothing_of_it(library: str) -> None:
    """A row with fewer tokens than the call has the outputs that it has alone."""
    T, real = 12, [12, 1, 5]
    batch = make_case(Shape(), [40, 300, 0], T)
    together = op.call(library, batch)
    for b, count in enumerate(real):
        alone = op.call(
            library,
            batch.row(b).tokens(0, count, {"k_out": batch.tensors["k_cache"][b : b + 1], "v_out": batch.tensors["v_cache"][b : b + 1]}),
        )
        assert np.array_equal(together["y"][b, :count], alone["y"][0])
        end = batch.lengths[b] + count
        assert np.array_equal(together["k_out"][b, :, :end], alone["k_out"][0, :, :end])
        assert np.isfinite(together["y"][b]).all()


def test_tables_of_each_sequence(library: str) -> None:
    """cos and sin [B,S',R/2] are those of the sequence."""
    case = make_case(Shape(), [5, 9], 3)
    turned = make_case(Shape(), [5, 9], 3)
    turned.tensors["cos"], turned.tensors["sin"] = turned.tensors["cos"][::-1].copy(), turned.tensors["sin"][::-1].copy()
    tables = {name: np.stack([case.tensors[name], turned.tensors[name]]) for name in ("cos", "sin")}
    got = op.call(library, case.replaced(**tables))
    assert np.array_equal(got["y"][0], op.call(library, case)["y"][0])
    assert np.array_equal(got["y"][1], op.call(library, turned)["y"][1])
    assert not np.array_equal(got["y"][1], op.call(library, case)["y"][1])


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_other_instruction_sets(library: str, isa: str) -> None:
    """The best one of this machine is what the other tests run."""
    if platform.machine() != "x86_64":
        pytest.skip("one instruction set on this machine")
    check_in_instruction_set(op, library, isa)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": np.array([-1, 0])}, "do not fit the cache"),
        ({"length": np.array([0, 9])}, "do not fit the cache"),
        ({"length": np.array([0])}, "length is not"),
        ({"gate": np.zeros((2, 3, 8), np.float32)}, "q and gate are not"),
        ({"v": np.zeros((2, 2, 64), np.float32)}, "k and v are not"),
        ({"v_cache": np.zeros((2, 2, 4, 32), np.float32)}, "the caches are not"),
        ({"k_norm": np.zeros(31, np.float32)}, "the norms are not"),
        ({"sin": np.zeros((8, 4), np.float32)}, "cos and sin are not"),
    ],
)
def test_counts_and_shapes_that_do_not_fit_are_refused(library: str, change: dict[str, Any], message: str) -> None:
    case = make_case(Shape(), [2, 0], 3)
    with pytest.raises(Exception, match=message):
        op.call(library, case.replaced(**change))
