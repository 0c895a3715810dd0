"""Steps of an engine with drafts: how many calls of the graph they take."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.generation import Request
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.sampling.token_history import TokenHistory
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.speculation.acceptance import acceptance_for
from qwen_export.runtimes.speculation.drafters import HeadDrafter
from tests.support.kernel_families import needs_plugin

STREAMS, NEW = 4, 40


@needs_plugin
@pytest.mark.parametrize(("drafts", "most"), [(2, 1.5), ("lookup", 2.5)])
def test_a_step_verifies_all_rows_in_one_call(demo_bundle: Path, drafts: int | str, most: float) -> None:
    """Some calls more than steps: prompts, and rows with so many tokens more or less that padding would cost more than a call."""
    calls = 0

    def counted(*_: object) -> None:
        nonlocal calls
        calls += 1

    with load(demo_bundle, threads=1, speculate=drafts, max_context=256) as model:

        def decoder() -> Decoder:
            made = model.decoder(STREAMS, drafts=drafts != "lookup")
            made.observer = counted
            return made

        def request(start: int) -> Request:
            sampler = Sampler(SamplingParams(greedy=True), model.tokenizer.vocab_size)
            return Request([*range(start, start + 16)] * 2, sampler, (), NEW)

        with Engine(decoder, drafts=drafts, prefix_memory=0) as engine:
            streams = [engine.submit(request(100 + 50 * number)) for number in range(STREAMS)]
            texts = [list(stream) for stream in streams]
            steps = engine.statistics.steps
        assert [len(text) for text in texts] == [NEW] * STREAMS
        drafted = sum(sum(stream.statistics.speculation.drafted) for stream in streams)
    assert drafted > 0 and steps < NEW + 10
    assert calls <= most * steps


def test_a_head_that_was_left_behind_drafts_on(demo_bundle: Path) -> None:
    """Behind steps that the head did not follow drafts are kept, if fewer, and the text is that of steps."""
    greedy = Sampler(SamplingParams(greedy=True))
    with load(demo_bundle, threads=1, speculate=2, max_context=512) as model:
        prompts = [model.tokenizer.encode(Path(__file__).read_text(encoding="utf-8"))[start : start + 96] for start in (40, 200)]
        plain, decoder = model.decoder(2), model.decoder(2, drafts=True)
        texts = [[int(plain.prefill(ids, slot).argmax())] for slot, ids in enumerate(prompts)]
        for _ in range(NEW):
            for text, token in zip(texts, plain.step([text[-1] for text in texts]).argmax(), strict=True):
                text.append(token)
        head = decoder.head
        assert head is not None and head.may_leave
        for slot, ids in enumerate(prompts):
            decoder.prefill(ids, slot)
        for place, left in enumerate([True] * 5 + [False] * 3 + [True] * 4):
            head.follows = not left
            decoder.step([text[place] for text in texts])
        kept = made = 0
        for slot, text in enumerate(texts):
            place = 12
            while place + 3 < NEW:
                history = TokenHistory(decoder.tokens(slot))
                history.push(text[place])
                drafts = HeadDrafter(head, slot).draft(text[place], 2, greedy, acceptance_for(greedy), history)
                found = decoder.verify([text[place], *(draft.token for draft in drafts)], slot).argmax()
                right = [draft.token == token for draft, token in zip(drafts, text[place + 1 :], strict=False)]
                count = right.index(False) if False in right else len(right)
                assert found[: count + 1] == text[place + 1 : place + 2 + count]
                decoder.accept(1 + count, slot)
                kept, made, place = kept + count, made + len(drafts), place + 1 + count
        assert 4 * kept > made
