"""Which tokens of a prompt an engine reads: only those that no earlier prompt had, counted on the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.generation import Request
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.serving.engine import Engine

GREEDY = SamplingParams(greedy=True)


@pytest.fixture(scope="module")
def model(demo_bundle: Path) -> Model:
    return load(demo_bundle, threads=1, max_context=4096, speculate="off")


class Counting:
    """An engine that counts the tokens of its calls."""

    def __init__(self, model: Model, slots: int = 2) -> None:
        self.model, self.read = model, 0

        def decoder() -> Decoder:
            made = model.decoder(slots)
            made.observer = self.observe
            return made

        self.engine = Engine(decoder)

    def observe(self, before: int, count: int, results: Mapping[str, Any]) -> None:
        self.read += count

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> tuple[Any, int, int]:
        """The answer, the tokens of its prompt, and those that were read of it."""
        self.read = 0
        prepared = self.model.prepare_chat(messages, sampling=GREEDY, max_new_tokens=8, **options)
        answer = self.engine.answer(prepared)
        list(answer.events())
        return answer, len(prepared.request.ids), self.read - max(0, answer.statistics.new_tokens - 1)


def test_an_agent_reads_only_what_is_new(model: Model) -> None:
    """A request of some 2000 tokens comes again with other last lines, from other conversations."""
    counting = Counting(model)
    rules = {"role": "system", "content": "Rule: never touch the files of others, and report what you did.\n" * 90}
    with counting.engine:
        _, whole, read = counting.chat([rules, {"role": "user", "content": "List the files."}])
        assert whole > 1500
        assert read == whole
        counting.chat([rules, {"role": "user", "content": "Count the lines of main.py."}])  # parts from the first behind the rules
        answer, whole, read = counting.chat([rules, {"role": "user", "content": "What does setup.cfg say?"}])
        assert read < 60
        assert answer.statistics.reused_tokens == whole - read


@pytest.mark.parametrize("preserve", [False, True])
def test_a_tool_loop_and_the_turn_after_it(model: Model, preserve: bool) -> None:
    """The template drops the reasoning of earlier turns, or keeps it. Either way only the last lines are read."""
    counting = Counting(model)
    options = {"preserve_thinking": True} if preserve and "preserve_thinking" in model.template.variables else {}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Look at this text: " + "one two three four five " * 80}]
    with counting.engine:
        _, whole, _ = counting.chat(messages, **options)
        loop = whole
        for step in range(3):
            call = {"function": {"name": "look", "arguments": {"line": step}}, "type": "function"}
            messages += [
                {"role": "assistant", "content": "", "reasoning_content": f"Let me look at line {step}.", "tool_calls": [call]},
                {"role": "tool", "content": f"line {step}: empty"},
            ]
            answer, whole, read = counting.chat(messages, **options)
            assert answer.statistics.reused_tokens >= loop - 12
            assert read <= whole - loop + 12
            loop = whole
        messages += [{"role": "assistant", "content": "All empty.", "reasoning_content": "Done."}, {"role": "user", "content": "Thanks."}]
        _, whole, read = counting.chat(messages, **options)
        assert read < whole // 2, "the long first turn is not read again"


def test_many_requests_share_a_beginning(model: Model) -> None:
    """1000 tokens of 1100 are equal in all: from the third on they are not read, whoever runs beside."""
    with Engine.of(model, 4) as engine:
        shared = [11 * i % 4000 for i in range(1000)]
        prompts = [shared + [(37 * i + number) % 4000 for i in range(100)] for number in range(6)]
        reused = []
        for prompt in prompts:
            stream = engine.submit(Request(prompt, Sampler(GREEDY), (), 2))
            list(stream)
            reused.append(stream.statistics.reused_tokens)
        assert reused[:2] == [0, 0] or reused[1] >= 1000
        assert all(count >= 1000 for count in reused[2:])
        assert engine.statistics.prefix.hits >= 4


def test_a_conversation_with_drafts_reuses_exactly(demo_bundle: Path, model: Model) -> None:
    drafting = load(demo_bundle, threads=1, max_context=4096, speculate=3)
    with Engine.of(drafting, 2) as engine:
        messages = [{"role": "user", "content": "def fibonacci(n):"}]
        for turn in range(3):
            prepared = drafting.prepare_chat(messages, sampling=GREEDY, max_new_tokens=90, enable_thinking=False)
            answer = engine.answer(prepared)
            text = "".join(answer)
            expected = "".join(model.stream(messages, sampling=GREEDY, max_new_tokens=90, enable_thinking=False))
            assert text == expected
            assert turn == 0 or answer.statistics.reused_tokens > 0
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"And for n = {turn}?"}]
