"""The distribution is that of transformers' processors; choices are reproducible; padding is never chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qwen_export.errors import ParameterError, QwenExportError
from qwen_export.runtimes.decoding.logit_rows import Row, Rows, Top
from qwen_export.runtimes.sampling.distribution import Distribution
from qwen_export.runtimes.sampling.largest import nucleus, top_ids
from qwen_export.runtimes.sampling.sampler import Sampler, SamplingParams
from qwen_export.runtimes.sampling.sampling_defaults import FALLBACK, RECOMMENDED, ModelFacts, recommended
from qwen_export.runtimes.sampling.token_history import TokenHistory
from qwen_export.runtimes.text.chat_template import ChatTemplate
from tests.support.templates import OTHER_TEMPLATE, family_template

V = 248_320
PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.1, 0.7, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 2, 20, 5000]),
        "top_p": st.sampled_from([0.01, 0.5, 0.8, 0.95, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.8, 1.0, 1.3]),
    }
)


def transformers_probs(logits: np.ndarray, prompt: list[int], params: SamplingParams) -> np.ndarray:
    """float64[V] after transformers' processors, in the order in which `generate` puts them."""
    torch = pytest.importorskip("torch")
    processors: Any = pytest.importorskip("transformers.generation.logits_process")
    chain = [processors.RepetitionPenaltyLogitsProcessor(params.repetition_penalty), processors.TemperatureLogitsWarper(params.temperature)]
    chain += [processors.TopKLogitsWarper(params.top_k)] if params.top_k else []
    chain += [processors.TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    chain += [processors.MinPLogitsWarper(params.min_p)]
    ids, scores = torch.tensor([prompt], dtype=torch.int64), torch.tensor(logits[None], dtype=torch.float64)
    for process in chain:
        scores = process(ids, scores)
    return scores.softmax(-1)[0].numpy()


def dense(distribution: Distribution, size: int) -> np.ndarray:
    probs = np.zeros(size)
    probs[distribution.ids] = distribution.probs
    return probs


@settings(max_examples=200, deadline=None)
@given(PARAMS, st.integers(0, 2**32), st.sampled_from([5, 300, 3000]), st.sampled_from([0.3, 3.0]), st.integers(0, 4))
def test_distribution_equals_transformers(options: dict[str, Any], seed: int, size: int, spread: float, prompt_length: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(size) * spread
    prompt = rng.integers(0, size, prompt_length).tolist()
    params = SamplingParams(**options)
    expected = transformers_probs(logits, prompt, params)
    got = dense(Sampler(params).distribution(logits, TokenHistory(prompt)), size)
    # A cumulative sum within rounding of top_p may fall on either side.
    full = np.sort(transformers_probs(logits, prompt, SamplingParams(**{**options, "top_p": 1.0, "min_p": 0.0})))[::-1].cumsum()
    assume(params.top_p == 1 or np.abs(full - params.top_p).min() > 1e-9)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-15)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 20, 60, 700]), st.sampled_from([64, 1000, 20_001]), st.booleans())
def test_top_ids_are_the_k_largest_with_ties(seed: int, k: int, size: int, coarse: bool) -> None:
    x = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    x = np.round(x) if coarse else x
    expected = np.arange(size) if k >= size else np.flatnonzero(x >= np.sort(x)[-k])
    np.testing.assert_array_equal(top_ids(x, k), expected)


def test_nucleus_takes_the_lower_id_on_a_tie() -> None:
    assert nucleus(np.array([1.0, 4.0, 1.0, 4.0, 1.0]), 0.75).tolist() == [0, 1, 3]
    assert nucleus(np.ones(1000), 0.5).tolist() == list(range(500))


def test_full_vocabulary_in_float32() -> None:
    logits = (np.random.default_rng(0).standard_normal(V) * 3).astype(np.float32)
    for options in ({"top_k": 20, "top_p": 0.95}, {"top_p": 0.8, "temperature": 0.7}, {"min_p": 0.1}, {}):
        params = SamplingParams(**options)
        got = Sampler(params).distribution(logits)
        assert sum(got.probs) == pytest.approx(1) and np.all(np.diff(got.ids) > 0)
        np.testing.assert_allclose(dense(got, V), transformers_probs(logits, [], params), rtol=2e-4, atol=1e-7)


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    logits = np.array([0.0, 0.0, 0.0, 0.0])
    history = TokenHistory([0])
    for token in (1, 2, 2, 3):
        history.push(token)
    history.pop(3)
    sampler = Sampler(SamplingParams(presence_penalty=1.0, frequency_penalty=0.5))
    expected = np.exp([0, -1.5, -2.0, 0])
    np.testing.assert_allclose(sampler.distribution(logits, history).probs, expected / expected.sum())
    assert logits.tolist() == [0, 0, 0, 0], "the caller's logits were changed"
    assert history.seen().tolist() == [0, 1, 2]


def test_history_grows_and_takes_back() -> None:
    history = TokenHistory([5, 5, 7])
    tokens = np.random.default_rng(0).integers(0, 300, 1000).tolist()
    for token in tokens + [400] * 3:
        history.push(token)
    for _ in range(3):
        history.pop(400)
    ids, counts = history.generated()
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {t: tokens.count(t) for t in tokens}
    assert set(history.seen().tolist()) == {5, 7, *tokens}


def test_greedy_is_the_largest_logit_and_the_lowest_id_on_a_tie() -> None:
    logits = np.array([1, 3, 2, 3], np.float32)
    for params in (SamplingParams(greedy=True), SamplingParams(temperature=0)):
        distribution = Sampler(params).distribution(logits)
        assert distribution == ([1], [1.0])
    history = TokenHistory()
    history.push(1)
    assert Sampler(SamplingParams(greedy=True, presence_penalty=0.5)).sample(logits, history) == 3


def test_padding_rows_are_never_chosen() -> None:
    logits = np.zeros(V, np.float32)
    logits[248_077:] = 50
    for options in ({"greedy": True}, {"top_k": 20}, {"top_p": 0.9}, {}):
        sampler = Sampler(SamplingParams(seed=1, **options), vocab_limit=248_077)
        assert max(sampler.sample(logits) for _ in range(20)) < 248_077
        assert sampler.distribution(logits, TokenHistory([248_100])).of(248_100) == 0


def test_equal_seeds_give_equal_tokens() -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((50, 1000)).astype(np.float32)
    first, second, other = (Sampler(SamplingParams(seed=seed)) for seed in (7, 7, 8))
    tokens = [first.sample(row) for row in rows]
    assert tokens == [second.sample(row) for row in rows]
    assert tokens != [other.sample(row) for row in rows]
    assert tokens[:5] == [617, 911, 785, 215, 340], "a seed must mean the same in every release"


def test_samples_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.0001, 0.2, 0.2999]))
    sampler = Sampler(SamplingParams(seed=0))
    distribution = sampler.distribution(logits)
    counts = np.bincount([distribution.draw(sampler.rng.random()) for _ in range(20_000)], minlength=4)
    np.testing.assert_allclose(counts / 20_000, distribution.probs, atol=0.015)
    assert distribution.of(2) == pytest.approx(0.2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{"greedy": True}, {"top_k": 20}, {"top_p": 0.9}, {}])
def test_unusable_logits_are_an_error(bad: float, options: dict[str, Any]) -> None:
    logits = np.full(20_000, -np.inf if bad == -np.inf else 0.0, np.float32)
    logits[12_345] = bad
    with pytest.raises(QwenExportError, match="no usable logits"):
        Sampler(SamplingParams(**options)).sample(logits)


def test_masked_logits_are_fine() -> None:
    logits = np.full(10_000, -np.inf, np.float32)
    logits[[3, 9_999]] = 1.0
    for options in ({"top_k": 20}, {"top_p": 0.9}, {"top_k": 1}, {}):
        sampler = Sampler(SamplingParams(seed=0, **options))
        assert {sampler.sample(logits) for _ in range(50)} == {3, 9_999}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "0.7"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", 1.5),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("no_repeat_ngram_size", -1),
        ("min_new_tokens", 1.5),
        ("suppress_tokens", [-1]),
        ("suppress_tokens", 3),
        ("begin_suppress_tokens", "12"),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [3]),
    ],
)
def test_value_out_of_range_names_the_parameter(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=f"the value of {name} is .*: got") as caught:
        SamplingParams(**{name: value})
    assert caught.value.parameter == name


@pytest.mark.parametrize(
    ("variant", "generation", "small"), [("3.5", "3.5", False), ("3.5-small", "3.5", True), ("3.6", "3.6", False), ("3.8", "3.8", False)]
)
def test_generation_and_size_class_are_read_off_the_template(variant: str, generation: str, small: bool) -> None:
    facts = ModelFacts.from_template(ChatTemplate(family_template(variant)))
    assert facts == ModelFacts(generation, small)
    assert recommended(facts, thinking=True) == RECOMMENDED[generation, small, True]
    assert recommended(facts, thinking=False) == RECOMMENDED[generation, small, False]


def test_precedence_of_generation_config() -> None:
    known = ModelFacts("3.6", small=False)
    unknown = ModelFacts.from_template(ChatTemplate(OTHER_TEMPLATE))
    shipped = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 20, "eos_token_id": [248046, 248044]}
    tuned = shipped | {"temperature": 0.3}
    assert unknown.generation is None
    assert recommended(known, False, shipped) == SamplingParams(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5)
    assert recommended(known, False, tuned) == recommended(known, True, tuned) == SamplingParams(temperature=0.3, top_p=0.95, top_k=20)
    assert recommended(unknown, True, shipped) == SamplingParams(temperature=1.0, top_p=0.95, top_k=20)
    assert recommended(unknown, True, {"eos_token_id": 1}) == recommended(unknown, False) == FALLBACK
    assert recommended(known, True, {"do_sample": False}).is_greedy
    with pytest.raises(QwenExportError, match=r"generation_config.json, top_p"):
        recommended(known, True, {"top_p": 7})


def row_with_top(logits: np.ndarray, count: int) -> Row:
    """The row as a graph hands it over that picks the `count` largest logits."""
    order = np.lexsort((np.arange(len(logits)), -logits))[:count]
    return Rows(lambda: logits[None], lambda: Top(memoryview(logits[order]), memoryview(order.astype(np.int32))), count)[0]


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    size=st.integers(1, 200),
    count=st.integers(1, 64),
    levels=st.sampled_from([2, 5, 40, 10_000]),
    greedy=st.booleans(),
    top_k=st.sampled_from([0, 1, 3, 20]),
    penalty=st.sampled_from(
        [{}, {"presence_penalty": 1.5}, {"repetition_penalty": 1.3, "frequency_penalty": 0.5}, {"repetition_penalty": 0.8}]
    ),
    padding=st.integers(0, 20),
)
def test_the_largest_logits_are_as_good_as_all(
    data: st.DataObject, size: int, count: int, levels: int, greedy: bool, top_k: int, penalty: dict[str, float], padding: int
) -> None:
    """Few levels mean many ties; `padding` rows of the head are no tokens."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = ((rng.integers(0, levels, size) - levels // 2) / 4).astype(np.float32)
    history = TokenHistory(rng.integers(0, size, 20).tolist())
    for token in rng.integers(0, size, 30).tolist():
        history.push(token)
    sampler = Sampler(SamplingParams(greedy=greedy, top_k=top_k, temperature=0.7, top_p=0.9, seed=0, **penalty), max(1, size - padding))
    ids, probs = sampler.distribution(logits, history)
    few, shares = sampler.distribution(row_with_top(logits, min(count, size)), history)
    assert list(ids) == list(few)
    assert list(probs) == list(shares)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_largest_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    logits = np.zeros(50, np.float32)
    logits[7] = bad
    row = Rows(lambda: logits[None], lambda: Top(memoryview(logits[7:27]), memoryview(np.arange(7, 27, dtype=np.int32))), 20)[0]
    with pytest.raises(QwenExportError, match="no usable logits"):
        Sampler(SamplingParams(top_k=3, seed=0)).sample(row)
