"""Log probabilities over a text are transformers', wherever and however it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from qwen_export.errors import ParameterError
from qwen_export.runtimes import Generation, Model, SamplingParams, load
from qwen_export.runtimes.answer import Prepared
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.structured.answer_options import AnswerOptions

TEXT = (Path(__file__).parent.parent / "runtimes" / "sampling" / "distribution.py").read_text(encoding="utf-8")[:1100]
GREEDY = SamplingParams(greedy=True)


@pytest.fixture(scope="module")
def model(demo_bundle: Path) -> Model:
    return load(demo_bundle, threads=1, max_context=512, speculate=2)


@pytest.fixture(scope="module")
def expected(demo_checkpoint: Path, model: Model) -> torch.Tensor:
    reference = transformers.AutoModelForCausalLM.from_pretrained(str(demo_checkpoint), dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(reference(torch.tensor([model.tokenizer.encode(TEXT)])).logits[0].double(), -1)


def prepared(model: Model, new: int) -> Prepared:
    options = AnswerOptions(logprobs=1, prompt_logprobs=2)
    return model.prepare_text(TEXT, sampling=GREEDY, max_new_tokens=new, answer=options)


def check(answer: Generation, ids: list[int], expected: torch.Tensor) -> None:
    first, *found = answer.prompt_logprobs
    assert first is None
    assert [token.id for token in found if token is not None] == ids[1:]
    assert b"".join(token.text for token in found if token is not None).decode() == TEXT[len(TEXT) - len(answer_text(found)) :]
    for place, token in enumerate(found):
        assert token is not None
        assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=1e-4)
        assert [one.logprob for one in token.top] == pytest.approx(expected[place].topk(2).values.tolist(), abs=1e-4)


def answer_text(found: object) -> str:
    return b"".join(token.text for token in found).decode()  # type: ignore[attr-defined]


@pytest.mark.parametrize("new", [0, 3])
def test_a_prompt_alone_and_with_an_answer(model: Model, expected: torch.Tensor, new: int) -> None:
    ids = model.tokenizer.encode(TEXT)
    assert len(ids) > 100
    for _ in range(2):  # the second is read again, from its start
        answer = model.complete(TEXT, sampling=GREEDY, max_new_tokens=new, answer=AnswerOptions(logprobs=1, prompt_logprobs=2))
        tokens = [token for event in answer.events() for token in event.tokens]
        check(answer, ids, expected)
        assert (answer.statistics.finish, len(answer.tokens)) == ("length", new)
        if new:
            assert tokens[0].logprob == pytest.approx(float(expected[-1].max()), abs=1e-4)


def test_prompts_beside_others_in_an_engine(model: Model, expected: torch.Tensor) -> None:
    ids = model.tokenizer.encode(TEXT)
    with Engine.of(model, 4) as engine:
        others = [engine.answer(model.prepare_text(TEXT[:50], sampling=GREEDY, max_new_tokens=40)) for _ in range(2)]
        answers = [engine.answer(prepared(model, new)) for new in (0, 4, 0)]
        for answer in (*answers, *others):
            list(answer.events())
        for answer in answers:
            check(answer, ids, expected)
        assert answers[0].statistics.reused_tokens == 0


def test_no_tokens_are_wanted_for_nothing_else(model: Model) -> None:
    with pytest.raises(ParameterError, match="max_new_tokens"):
        model.prepare_text(TEXT, max_new_tokens=0)


def test_several_answers_read_their_prompt_once(model: Model) -> None:
    sampling, ids = SamplingParams(temperature=1.0, seed=5), model.tokenizer.encode(TEXT)
    with Engine.of(model, 4) as engine:
        answers = engine.answers(model.prepare_text(TEXT, sampling=sampling, max_new_tokens=6), 6)
        texts = ["".join(answer) for answer in answers]
        assert sum(answer.statistics.reused_tokens for answer in answers) == 5 * (len(ids) - 1)
    with Engine.of(model, 4, prefix_memory=0) as engine:
        assert ["".join(a) for a in engine.answers(model.prepare_text(TEXT, sampling=sampling, max_new_tokens=6), 6)] == texts
    assert len(set(texts)) == 6


def test_others_go_on_where_the_first_of_several_is_cancelled(model: Model) -> None:
    with Engine.of(model, 2) as engine:
        answers = engine.answers(model.prepare_text(TEXT, sampling=SamplingParams(seed=1), max_new_tokens=4), 4)
        answers[0].cancel()
        answers[2].cancel()
        for answer in answers:
            list(answer.events())
        assert [answer.statistics.finish for answer in (answers[1], answers[3])] == ["length", "length"]
        assert len("".join(engine.answer(model.prepare_text("x", sampling=GREEDY, max_new_tokens=2)))) > 0
