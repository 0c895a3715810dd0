"""Choosing many tokens at once gives the tokens that a sampler chooses one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.decoding.logit_rows import Row, Rows, Top
from qwen_export.runtimes.sampling.sampler import Sampler, SamplingParams
from qwen_export.runtimes.serving.choosing import choose
from qwen_export.runtimes.serving.served_call import ServedCall
from qwen_export.runtimes.serving.token_stream import ThreadInbox

V, K = 200, 32

PARAMS = st.builds(
    SamplingParams,
    greedy=st.booleans(),
    seed=st.integers(0, 1000),
    top_k=st.sampled_from([0, 1, 5, 20, 31, 40]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2, 0.9]),
    suppress_tokens=st.sampled_from([(), (3, 4)]),
)


def rows_of(logits: np.ndarray) -> list[Row]:
    """Rows with their largest entries picked, as a graph leaves them."""
    order = np.lexsort((np.arange(V) + np.zeros_like(logits, np.int64), -logits), axis=1)[:, :K].astype(np.int32)
    top = np.take_along_axis(logits, order.astype(np.int64), axis=1)
    whole = Top(memoryview(np.ascontiguousarray(top).reshape(-1)), memoryview(np.ascontiguousarray(order).reshape(-1)))
    rows = Rows(lambda: logits, lambda: whole, K)
    return [rows[i] for i in range(len(logits))]


def call(params: SamplingParams, vocab_limit: int | None, text: list[int]) -> ServedCall:
    made = ServedCall(0, Request([7, 8, 9], Sampler(params, vocab_limit), ()), Statistics(), ThreadInbox())
    for token in text:
        made.history.push(token)
    return made


@settings(max_examples=60, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=8), st.integers(0, 10**6), st.sampled_from([None, V, V - 30]), st.booleans())
def test_as_one_by_one(params: list[SamplingParams], seed: int, vocab_limit: int | None, coarse: bool) -> None:
    chance = np.random.default_rng(seed)
    logits = chance.normal(0, 3, (len(params), V)).astype(np.float32)
    if coarse:  # many equal entries
        logits = np.round(logits)
    text = chance.integers(0, V, 30).tolist()
    together = [call(p, vocab_limit, text) for p in params]
    alone = [call(p, vocab_limit, text) for p in params]
    for _ in range(3):
        chosen = choose(rows_of(logits), together)
        assert chosen == [one.request.sampler.sample(row, one.history) for one, row in zip(alone, rows_of(logits), strict=True)]


def test_a_row_without_usable_logits_is_its_own_error() -> None:
    logits = np.zeros((4, V), np.float32)
    logits[2] = np.nan
    params = SamplingParams(top_k=5, seed=1)
    chosen = choose(rows_of(logits + np.arange(V, dtype=np.float32)), [call(params, None, []) for _ in range(4)])
    assert [isinstance(token, Exception) for token in chosen] == [False, False, True, False]
