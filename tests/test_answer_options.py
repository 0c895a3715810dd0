"""What a request may require of an answer, from a model and from an engine, with drafts and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_export.errors import ParameterError
from qwen_export.runtimes import Generation, Model, SamplingParams, load
from qwen_export.runtimes.answer import Prepared
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.structured.answer_options import AnswerForm, AnswerOptions

GREEDY = SamplingParams(greedy=True)
CODE = "import os\n\n\ndef read_lines(path):\n"
CHAT = [{"role": "user", "content": "What does the function os.path.join do?"}]
MODES = ["plain", "drafts", "lookup", "engine", "engine with drafts"]
Answering = Callable[[Prepared], Generation]


@pytest.fixture(scope="module")
def models(demo_bundle: Path) -> dict[str, Model]:
    kinds: dict[str, str | int] = {"plain": "off", "drafts": 3, "lookup": "lookup"}
    return {name: load(demo_bundle, threads=1, max_context=256, speculate=kind) for name, kind in kinds.items()}


@pytest.fixture(scope="module", params=MODES)
def made(models: dict[str, Model], request: pytest.FixtureRequest) -> Iterator[tuple[Model, Answering]]:
    """A model, and a way to answer with it."""
    model = models["drafts" if "with drafts" in request.param else "plain" if request.param == "engine" else request.param]
    if "engine" in request.param:
        with Engine.of(model, 2) as engine:
            yield model, engine.answer
    else:
        yield model, lambda prepared: Generation(model.generate(prepared.request, statistics := _statistics()), statistics, prepared)


def _statistics() -> Any:
    from qwen_export.runtimes.decoding.generation import Statistics

    return Statistics()


def code(model: Model, options: AnswerOptions, sampling: SamplingParams = GREEDY, **others: Any) -> Prepared:
    return model.prepare_text(CODE, sampling=sampling, answer=options, **{"max_new_tokens": 24, **others})


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.8, top_k=20, presence_penalty=1.5, seed=3)])
def test_log_probabilities_are_those_of_the_whole_row(made: tuple[Model, Answering], sampling: SamplingParams) -> None:
    model, answer = made
    found = answer(code(model, AnswerOptions(logprobs=5, logit_bias={300: -5.0}), sampling))
    tokens = [token for event in found.events() for token in event.tokens]
    assert [token.id for token in tokens] == found.tokens
    ids = model.tokenizer.encode(CODE)
    rows = model.decoder().read([*ids, *found.tokens])[len(ids) - 1 : -1].astype(np.float64)
    expected = rows - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)) - rows.max(-1, keepdims=True)
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=2e-5)
        order = np.argsort(-row[: model.tokenizer.vocab_size], kind="stable")[:5]
        assert [one.logprob for one in token.top] == pytest.approx(list(row[order]), abs=2e-5)
        assert {one.id for one in token.top[:1]} == {int(order[0])}
    assert b"".join(token.text for token in tokens).decode() == found.content


def test_no_likeliest_tokens_where_none_are_wanted(made: tuple[Model, Answering]) -> None:
    model, answer = made
    for options, count in ((AnswerOptions(logprobs=0), 24), (AnswerOptions(), 0)):
        tokens = [token for event in answer(code(model, options)).events() for token in event.tokens]
        assert len(tokens) == count
        assert all(token.top == () for token in tokens)


def test_tokens_of_tags_belong_to_the_reasoning(made: tuple[Model, Answering]) -> None:
    model, answer = made
    options = AnswerOptions(logprobs=1)
    found = answer(model.prepare_chat(CHAT, enable_thinking=True, sampling=GREEDY, max_new_tokens=200, answer=options))
    events = list(found.events())
    tokens = {kind: [t.id for e in events if e.kind == kind for t in e.tokens] for kind in ("reasoning", "answer")}
    assert tokens["reasoning"] + tokens["answer"] == found.tokens
    close = model.tokenizer.id_of("</think>")
    assert close in tokens["reasoning"] and close not in tokens["answer"]
    assert found.statistics.reasoning_tokens == len(tokens["reasoning"])
    assert model.tokenizer.decode(tokens["answer"]) == found.content


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, top_k=20, seed=1), SamplingParams(temperature=1.0, seed=1)])
def test_a_bias_forbids_and_forces(made: tuple[Model, Answering], sampling: SamplingParams) -> None:
    model, answer = made
    free = answer(code(model, AnswerOptions(), sampling))
    list(free)
    common = max(set(free.tokens), key=free.tokens.count)
    without = answer(code(model, AnswerOptions(logit_bias={common: -100}), sampling))
    list(without)
    assert common not in without.tokens
    forced = answer(code(model, AnswerOptions(logit_bias={1234: 100.0}), sampling))
    list(forced)
    assert forced.tokens == [1234] * 24


def test_stop_tokens_of_the_request(made: tuple[Model, Answering]) -> None:
    model, answer = made
    free = answer(code(model, AnswerOptions()))
    list(free)
    stop = free.tokens[9]
    found = answer(code(model, AnswerOptions(stop_token_ids=[stop])))
    list(found)
    assert found.tokens == free.tokens[: free.tokens.index(stop)]
    assert (found.statistics.finish, found.statistics.stop_reason) == ("stop", stop)


def test_the_models_own_end_is_no_reason_and_can_be_ignored(made: tuple[Model, Answering]) -> None:
    model, answer = made
    prepared = model.prepare_chat(CHAT, enable_thinking=False, sampling=GREEDY, max_new_tokens=120)
    found = answer(prepared)
    list(found)
    assert (found.statistics.finish, found.statistics.stop_reason) == ("stop", None)
    limit = len(found.tokens) + 10
    on = answer(
        model.prepare_chat(CHAT, enable_thinking=False, sampling=GREEDY, max_new_tokens=limit, answer=AnswerOptions(ignore_eos=True))
    )
    list(on)
    assert on.tokens[: len(found.tokens)] == found.tokens
    assert len(on.tokens) == limit and on.statistics.finish == "length"
    least = AnswerOptions(min_new_tokens=limit)
    longer = answer(model.prepare_chat(CHAT, enable_thinking=False, sampling=GREEDY, max_new_tokens=200, answer=least))
    list(longer)
    assert len(longer.tokens) >= limit and not set(longer.tokens) & model.stop_ids


def test_stop_strings_stay_where_wanted_and_wait_for_the_least_length(made: tuple[Model, Answering]) -> None:
    model, answer = made
    free = "".join(answer(code(model, AnswerOptions())))
    stop = free[20:24]
    found = answer(code(model, AnswerOptions(include_stop=True), stop=[stop]))
    assert "".join(found) == free[: free.index(stop) + len(stop)]
    assert (found.statistics.finish, found.statistics.stop_reason) == ("stop", stop)
    late = answer(code(model, AnswerOptions(min_new_tokens=24), stop=[stop]))
    assert "".join(late) == free


def test_several_answers_each_have_a_seed(models: dict[str, Model]) -> None:
    model, sampling = models["plain"], SamplingParams(temperature=1.0, seed=7)
    with Engine.of(model, 4) as engine:
        texts = ["".join(one) for one in engine.answers(code(model, AnswerOptions(), sampling), 3)]
        alone = ["".join(engine.answer(code(model, AnswerOptions(), replace(sampling, seed=7 + i)))) for i in range(3)]
        with pytest.raises(ParameterError, match="number of answers"):
            engine.answers(code(model, AnswerOptions()), 0)
    assert texts == alone and len(set(texts)) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logprobs", -1),
        ("prompt_logprobs", True),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", [1]),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [1.5]),
        ("min_new_tokens", None),
        ("thinking_budget", -1),
        ("ignore_eos", "yes"),
        ("tool_choice", "any"),
        ("form", "json"),
    ],
)
def test_values_that_are_not_usable(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=name):
        AnswerOptions(**{name: value})


@pytest.mark.parametrize(("kind", "value"), [("json", None), ("json_schema", "x"), ("choice", ()), ("choice", ("",)), ("regex", 1)])
def test_forms_that_are_not_usable(kind: Any, value: Any) -> None:
    with pytest.raises(ParameterError, match="form"):
        AnswerForm(kind, value)


def test_ids_that_the_tokenizer_does_not_have(models: dict[str, Model]) -> None:
    beyond = models["plain"].tokenizer.vocab_size
    for options in (AnswerOptions(logit_bias={beyond: 1.0}), AnswerOptions(stop_token_ids=[beyond])):
        with pytest.raises(ParameterError, match="vocabulary"):
            code(models["plain"], options)
