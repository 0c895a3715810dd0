"""Forbidden tokens are those that transformers' processors forbid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_export.errors import QwenExportError
from qwen_export.runtimes.decoding.logit_rows import Row, Rows, Top
from qwen_export.runtimes.sampling.sampler import Sampler, SamplingParams
from qwen_export.runtimes.sampling.token_history import TokenHistory

SIZE = 12
IDS = st.integers(0, SIZE - 1)
RULES = st.fixed_dictionaries(
    {
        "suppress_tokens": st.lists(IDS, max_size=2).map(tuple),
        "begin_suppress_tokens": st.lists(IDS, max_size=2).map(tuple),
        "bad_words_ids": st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), max_size=4, unique=True).map(tuple),
        "no_repeat_ngram_size": st.integers(0, 4),
        "min_new_tokens": st.integers(0, 3),
    }
)


def forbidden_by_transformers(prompt: list[int], answer: list[int], rules: dict[str, Any], stops: list[int]) -> set[int]:
    torch = pytest.importorskip("torch")
    processors: Any = pytest.importorskip("transformers.generation.logits_process")
    chain = []
    if rules["no_repeat_ngram_size"]:
        chain.append(processors.NoRepeatNGramLogitsProcessor(rules["no_repeat_ngram_size"]))
    words = [list(word) for word in rules["bad_words_ids"] if list(word) not in [[s] for s in stops]]
    if words:
        chain.append(processors.NoBadWordsLogitsProcessor(words, stops))
    if rules["min_new_tokens"]:
        chain.append(processors.MinNewTokensLengthLogitsProcessor(len(prompt), rules["min_new_tokens"], stops))
    chain.append(processors.SuppressTokensLogitsProcessor(rules["suppress_tokens"]))
    chain.append(processors.SuppressTokensAtBeginLogitsProcessor(rules["begin_suppress_tokens"], len(prompt)))
    scores = torch.zeros(1, SIZE)
    ids = torch.tensor([prompt + answer], dtype=torch.int64)
    for process in chain:
        scores = process(ids, scores)
    return set(torch.nonzero(torch.isinf(scores[0])).flatten().tolist())


def row_with_top(logits: np.ndarray, count: int) -> Row:
    order = np.lexsort((np.arange(len(logits)), -logits))[:count]
    return Rows(lambda: logits[None], lambda: Top(memoryview(logits[order]), memoryview(order.astype(np.int32))), count)[0]


@settings(max_examples=300, deadline=None)
@given(
    rules=RULES,
    prompt=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    answer=st.lists(st.integers(1, 5), max_size=8),
    drafts=st.lists(IDS, max_size=3),
    count=st.integers(1, SIZE),
    top_k=st.sampled_from([0, 2, 5]),
)
def test_the_same_tokens_as_in_transformers_are_forbidden(
    rules: dict[str, Any], prompt: list[int], answer: list[int], drafts: list[int], count: int, top_k: int
) -> None:
    stops = [3, 11]
    expected = forbidden_by_transformers(prompt, answer, rules, stops)
    history = TokenHistory(prompt)
    for token in answer:
        history.push(token)
    for token in drafts:  # a draft that was not kept leaves nothing behind
        history.push(token)
    for token in reversed(drafts):
        history.pop(token)
    logits = (np.arange(SIZE) / 8).astype(np.float32)
    params = SamplingParams(seed=0, top_k=top_k, **rules)
    if len(expected) == SIZE:
        with pytest.raises(QwenExportError, match="every token is forbidden"):
            Sampler(params, None, stops).distribution(logits, history)
        return
    distribution = Sampler(params, None, stops).distribution(logits, history)
    possible = {int(i) for i, p in zip(distribution.ids, distribution.probs, strict=True) if p > 0}
    allowed = sorted(set(range(SIZE)) - expected, reverse=True)
    assert possible == set(allowed[:top_k] if top_k else allowed)
    few = Sampler(params, None, stops).distribution(row_with_top(logits, count), history)
    assert {int(i) for i, p in zip(few.ids, few.probs, strict=True) if p > 0} == possible
    greedy = Sampler(SamplingParams(greedy=True, **rules), None, stops)
    assert greedy.sample(row_with_top(logits, count), history) == greedy.sample(logits, history) == allowed[0]
    assert logits.tolist() == (np.arange(SIZE) / 8).astype(np.float32).tolist(), "the caller's logits were changed"


def test_unusable_logits_stay_an_error_with_rules() -> None:
    logits = np.zeros(50, np.float32)
    logits[7] = np.nan
    for tokens in ((3,), (7,)):
        with pytest.raises(QwenExportError, match="no usable logits"):
            Sampler(SamplingParams(suppress_tokens=tokens)).sample(logits)


def test_a_rule_about_ids_outside_the_vocabulary_has_no_effect() -> None:
    logits = np.zeros(5, np.float32)
    assert len(Sampler(SamplingParams(suppress_tokens=(7,)), 4).distribution(logits).ids) == 4
