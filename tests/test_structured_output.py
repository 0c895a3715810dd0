"""Answers of a given form: each one that ends is of the form, however it is made, and the form changes no more than it must."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_export.errors import ParameterError
from qwen_export.runtimes import Generation, Model, SamplingParams, load
from qwen_export.runtimes.decoding.generation import Statistics
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.sampling.token_history import TokenHistory
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.structured.answer_options import AnswerForm, AnswerOptions
from tests.support.random_schemas import SCHEMAS

CHAT = [{"role": "user", "content": "What does the function os.path.join do?"}]
SAMPLED = SamplingParams(temperature=1.0, seed=3)
FORMS = {
    "choice": AnswerForm("choice", ("yes", "no", "maybe so", 'a "quoted"\nline')),
    "regex": AnswerForm("regex", r"[a-z]{3}-\d{2}/[xy]"),
    "grammar": AnswerForm("grammar", 'start: "(" inner ")"\ninner: /[a-z]{1,5}/ | start'),
    "schema": AnswerForm(
        "json_schema",
        {
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["n"],
            "additionalProperties": False,
        },
    ),
}


@pytest.fixture(scope="module")
def models(demo_bundle: Path) -> dict[str, Model]:
    kinds: dict[str, str | int] = {"plain": "off", "drafts": 3, "lookup": "lookup"}
    return {name: load(demo_bundle, threads=1, max_context=512, speculate=kind) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def engines(models: dict[str, Model]) -> Iterator[dict[str, Engine]]:
    with Engine.of(models["plain"], 8) as plain, Engine.of(models["drafts"], 4) as drafts:
        yield {"plain": plain, "drafts": drafts}


def options(form: AnswerForm) -> AnswerOptions:
    return AnswerOptions(form=form)


def fits(form: AnswerForm, text: str) -> bool:
    match form.kind:
        case "choice":
            return text in form.value
        case "regex":
            return re.fullmatch(form.value, text) is not None
        case "grammar":
            return re.fullmatch(r"(\(+)[a-z]{1,5}(\)+)", text) is not None and text.count("(") == text.count(")")
        case _:
            jsonschema.validate(json.loads(text), form.value)
            return True


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("thinking", [False, True])
def test_forms_with_drafts_and_without(models: dict[str, Model], name: str, thinking: bool) -> None:
    texts = set()
    for model in models.values():
        answer = model.stream(CHAT, enable_thinking=thinking, sampling=SAMPLED, max_new_tokens=120, answer=options(FORMS[name]))
        list(answer.events())
        assert answer.statistics.finish == "stop"
        assert fits(FORMS[name], answer.content)
        assert bool(answer.reasoning) == thinking
        texts.add((answer.reasoning, answer.content))
    assert len(texts) == 1


@pytest.mark.parametrize("kind", ["plain", "drafts"])
@settings(max_examples=38, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schemas=st.lists(SCHEMAS, min_size=8, max_size=8))
def test_every_finished_answer_validates(
    models: dict[str, Model], engines: dict[str, Engine], kind: str, schemas: list[dict[str, Any]]
) -> None:
    """Over 300 schemas, eight answers at a time."""
    answers = []
    for number, schema in enumerate(schemas):
        sampling = SamplingParams(temperature=1.0, top_k=20 if number % 2 else 0, presence_penalty=0.5, seed=number)
        prepared = models[kind].prepare_text(
            "def f(x):\n", sampling=sampling, max_new_tokens=50, answer=options(AnswerForm("json_schema", schema))
        )
        answers.append((schema, engines[kind].answer(prepared)))
    for schema, answer in answers:
        text = "".join(answer)
        if answer.statistics.finish == "stop":
            jsonschema.validate(json.loads(text), schema)
        else:
            assert (answer.statistics.finish, len(answer.tokens)) == ("length", 50)


def test_a_batch_of_different_forms_is_each_alone(models: dict[str, Model], engines: dict[str, Engine]) -> None:
    for kind, engine in engines.items():
        model = models[kind]
        wanted = [AnswerOptions(), *map(options, FORMS.values()), AnswerOptions(thinking_budget=4)]
        samplings = [SamplingParams(temperature=1.0, seed=seed) for seed in range(len(wanted))]
        together = [
            engine.answer(model.prepare_chat(CHAT, enable_thinking=True, sampling=sampling, max_new_tokens=60, answer=one))
            for one, sampling in zip(wanted, samplings, strict=True)
        ]
        for one, sampling, answer in zip(wanted, samplings, together, strict=True):
            list(answer.events())
            alone = model.stream(CHAT, enable_thinking=True, sampling=sampling, max_new_tokens=60, answer=one)
            list(alone.events())
            assert answer.tokens == alone.tokens


def distribution(model: Model, prompt: list[int], form: AnswerForm) -> dict[tuple[int, ...], float]:
    """The probability of every answer, from the rows of the model and the constraint alone."""
    found: dict[tuple[int, ...], float] = {}

    def follow(tokens: tuple[int, ...], probability: float) -> None:
        made = model.prepare_text("x", answer=options(form)).request.sampler
        sampler = Sampler(SamplingParams(temperature=1.0), model.tokenizer.vocab_size, (), made.constraint)
        history = TokenHistory(prompt)
        for token in tokens:
            history.push(token)
        row = model.decoder().read([*prompt, *tokens])[-1]
        chances = sampler.distribution(row, history)
        for token, chance in zip(chances.ids, chances.probs, strict=True):
            if token in model.stop_ids:
                found[tokens] = found.get(tokens, 0.0) + probability * float(chance)
            else:
                follow((*tokens, int(token)), probability * float(chance))

    follow((), 1.0)
    return found


@pytest.mark.parametrize("kind", ["plain", "drafts", "lookup"])
def test_the_distribution_is_the_models_own_within_the_form(models: dict[str, Model], kind: str) -> None:
    """Chi-square over all answers of a form with few. Without a seed drafts are kept or rejected by chance."""
    model, form, count = models[kind], AnswerForm("regex", "(re|[ab])(turn|s)?"), 600
    prompt = model.tokenizer.encode("def f(x):\n    ")
    expected = distribution(model, prompt, form)
    assert sum(expected.values()) == pytest.approx(1.0)
    seen: Counter[tuple[int, ...]] = Counter()
    for number in range(count):
        prepared = model.prepare_text("def f(x):\n    ", sampling=SamplingParams(temperature=1.0), answer=options(form))
        prepared.request.sampler.rng = np.random.Generator(np.random.PCG64(number))
        answer = Generation(model.generate(prepared.request, statistics := Statistics()), statistics, prepared)
        list(answer.events())
        seen[tuple(answer.tokens)] += 1
    assert set(seen) <= set(expected)
    large = {tokens: p for tokens, p in expected.items() if p * count >= 5}
    assert len(large) >= 3
    rest, rest_seen = 1 - sum(large.values()), count - sum(seen[tokens] for tokens in large)
    square = sum((seen[tokens] - p * count) ** 2 / (p * count) for tokens, p in large.items())
    square += (rest_seen - rest * count) ** 2 / (rest * count) if rest * count >= 1 else 0.0
    freedom = len(large)
    assert square < freedom + 4.5 * (2 * freedom) ** 0.5  # some 4.5 standard deviations


def test_log_probabilities_are_the_models_under_a_form(models: dict[str, Model]) -> None:
    """Without drafts and with: not those of the masked row."""
    found = []
    for model in models.values():
        wanted = AnswerOptions(form=FORMS["choice"], logprobs=2)
        answer = model.stream(CHAT, enable_thinking=False, sampling=SAMPLED, max_new_tokens=20, answer=wanted)
        found.append([token.logprob for event in answer.events() for token in event.tokens])
    assert found[0] == pytest.approx(found[1], abs=1e-4) and found[0] == pytest.approx(found[2], abs=1e-4)
    assert min(found[0]) < -1.0


def test_what_is_allowed_does_not_depend_on_drafts_that_were_taken_back(models: dict[str, Model]) -> None:
    """Random texts of a form: forwards, with drafts that are left again, against a constraint that sees each text once."""
    model = models["plain"]
    prepared = model.prepare_text("x", answer=options(AnswerForm("json_object")))
    structural = {token for token in range(model.tokenizer.vocab_size) if set(model.tokenizer.decode([token])) & set('{}[]":,')}
    for seed in range(6):
        rng = np.random.default_rng(seed)
        tried = prepared.again(seed).request.sampler.constraint
        assert tried is not None
        text: list[int] = []
        for step in range(60):
            draft = list(text)
            for _ in range(int(rng.integers(1, 5))):
                mask = tried.allowed(np.array(draft, np.int64))
                if mask is None:
                    break
                ids = np.flatnonzero(mask.array(model.tokenizer.vocab_size))  # type: ignore[union-attr]
                some = [token for token in ids.tolist() if token in structural] if rng.random() < 0.7 else []
                draft.append(int(rng.choice(some or ids)))
            fresh = prepared.again(seed).request.sampler.constraint
            assert fresh is not None
            if model.stop_ids & set(draft):
                draft = draft[: next(i for i, token in enumerate(draft) if token in model.stop_ids)]
            got, expected = (one.allowed(np.array(draft, np.int64)) for one in (tried, fresh))
            assert np.array_equal(*(one.array(8192) for one in (got, expected)))  # type: ignore[union-attr]
            text = draft[: len(text) + int(rng.integers(0, 3))] if step % 5 else draft


def test_a_limit_cuts_the_form(models: dict[str, Model]) -> None:
    for model in models.values():
        answer = model.stream(CHAT, enable_thinking=False, sampling=SAMPLED, max_new_tokens=2, answer=options(FORMS["schema"]))
        list(answer.events())
        assert (answer.statistics.finish, len(answer.tokens)) == ("length", 2)


@pytest.mark.parametrize(
    ("form", "named"),
    [
        (AnswerForm("json_schema", {"type": "array", "uniqueItems": True}), "uniqueItems"),
        (AnswerForm("json_schema", False), "no text fits"),
        (AnswerForm("json_schema", {"const": float("nan")}), "not JSON"),
        (AnswerForm("json_schema", {"$ref": "http://example.com/x"}), "form"),
        (AnswerForm("regex", "(a"), "form"),
        (AnswerForm("grammar", "start: nothing"), "nothing"),
    ],
)
def test_a_form_that_cannot_be_held_is_refused_before_the_answer(models: dict[str, Model], form: AnswerForm, named: str) -> None:
    for thinking in (False, True):
        with pytest.raises(ParameterError, match=named):
            models["plain"].prepare_chat(CHAT, enable_thinking=thinking, answer=options(form))


def test_keywords_that_are_not_known_can_be_left_out(models: dict[str, Model]) -> None:
    form = AnswerForm("json_schema", {"type": "array", "uniqueItems": True, "items": {"enum": [1, 2]}, "maxItems": 2}, strict=False)
    answer = models["plain"].stream(CHAT, enable_thinking=False, sampling=SAMPLED, max_new_tokens=60, answer=options(form))
    assert set(json.loads("".join(answer))) <= {1, 2}


def test_a_form_excludes_what_would_not_let_it_end(models: dict[str, Model]) -> None:
    for other in ({"ignore_eos": True}, {"min_new_tokens": 5}):
        with pytest.raises(ParameterError, match="ends with the form"):
            models["plain"].prepare_chat(CHAT, answer=AnswerOptions(form=FORMS["regex"], **other))
