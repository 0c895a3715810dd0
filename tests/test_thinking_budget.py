"""A limit of reasoning closes it, once and in whole characters, whatever drafts and form the answer has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.structured.answer_options import AnswerForm, AnswerOptions
from qwen_export.runtimes.structured.thinking_budget import ThinkingBudget

CHAT = [{"role": "user", "content": "What does the function os.path.join do?"}]
SAMPLED = SamplingParams(temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def models(demo_bundle: Path) -> list[Model]:
    return [load(demo_bundle, threads=1, max_context=256, speculate=kind) for kind in ("off", 3, "lookup")]


@pytest.mark.parametrize("budget", [0, 1, 5, 12])
@pytest.mark.parametrize("form", [None, AnswerForm("choice", ("yes", "no"))])
def test_reasoning_ends_at_the_budget(models: list[Model], budget: int, form: AnswerForm | None) -> None:
    closing = models[0].tokenizer.encode("\n</think>\n\n")
    texts = set()
    for model in models:
        wanted = AnswerOptions(thinking_budget=budget, form=form)
        answer = model.stream(CHAT, enable_thinking=True, sampling=SAMPLED, max_new_tokens=60, answer=wanted)
        list(answer.events())
        assert answer.tokens[budget : budget + len(closing)] == closing
        assert answer.statistics.reasoning_tokens == budget + len(closing)
        assert answer.tokens.count(model.tokenizer.id_of("</think>")) == 1
        assert form is None or answer.content in form.value
        texts.add(tuple(answer.tokens))
    assert len(texts) == 1
    with Engine.of(models[1], 2) as engine:
        prepared = models[1].prepare_chat(
            CHAT, enable_thinking=True, sampling=SAMPLED, max_new_tokens=60, answer=AnswerOptions(thinking_budget=budget, form=form)
        )
        answer = engine.answer(prepared)
        list(answer.events())
        assert {tuple(answer.tokens)} == texts


def test_no_effect_where_the_reasoning_is_shorter_or_absent(models: list[Model]) -> None:
    model = models[0]
    for thinking in (True, False):
        tokens = []
        for wanted in (AnswerOptions(), AnswerOptions(thinking_budget=100 if thinking else 0)):
            answer = model.stream(CHAT, enable_thinking=thinking, sampling=SAMPLED, max_new_tokens=60, answer=wanted)
            list(answer.events())
            tokens.append(answer.tokens)
        assert tokens[0] == tokens[1]


def test_a_character_is_completed_first(models: list[Model]) -> None:
    tokenizer = models[0].tokenizer
    emoji = tokenizer.encode("🙂")
    assert len(emoji) > 1
    budget = ThinkingBudget(1, tokenizer, None, tools=False)
    closing = tokenizer.encode("\n</think>\n\n")
    text = np.array([*emoji, *closing])
    for count in range(len(emoji)):
        assert budget.allowed(text[:count]) is None
    for place, token in enumerate(closing):
        allowed = budget.allowed(text[: len(emoji) + place])
        assert allowed is not None and allowed.few(4).tolist() == [token]  # type: ignore[union-attr]
    assert budget.allowed(text) is None
    assert list(budget.forced(text[: len(emoji)])) == closing
    assert budget.fitting(text[:0], [*emoji, 5]) == len(emoji)


def test_a_call_in_the_reasoning_is_not_cut(models: list[Model]) -> None:
    tokenizer = models[0].tokenizer
    budget = ThinkingBudget(2, tokenizer, None, tools=True)
    call = np.array(tokenizer.encode("Hm\n<tool_call>\n<function=now>\n</function>\n</tool_call>"))
    start = tokenizer.encode("Hm\n<tool_call>")
    assert all(budget.allowed(call[:count]) is None for count in range(len(start), len(call)))
    talk = np.array(tokenizer.encode("<tool_call> is a tag"))
    assert budget.allowed(talk[:2]) is not None
