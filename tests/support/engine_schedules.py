"""Random schedules for an engine: who arrives when, with which prompt and sampling, and who leaves before the end."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

from qwen_export.runtimes import Model, SamplingParams
from qwen_export.runtimes.decoding.generation import Finish, Request, Statistics
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.serving.token_stream import TokenStream

TEXT = Path(__file__).parent.parent / "data" / "held_out.py.txt"


@dataclass
class Visit:
    """A request that arrives when the visits before it have given `after` tokens, and leaves after `leaves` tokens of its own."""

    ids: list[int]
    params: SamplingParams
    new_tokens: int
    mark_at: int | None
    after: int
    leaves: int | None

    def request(self, model: Model) -> Request:
        sampler = Sampler(self.params, model.tokenizer.vocab_size)
        return Request(self.ids, sampler, (), self.new_tokens, self.mark_at)


def visits(model: Model, seed: int, count: int, longest: int, answers: int) -> list[Visit]:
    """Prompts of 1 to `longest` tokens of real text, many of which begin alike, and answers of up to `answers` tokens."""
    chance = random.Random(seed)
    text = model.tokenizer.encode(TEXT.read_text())
    text *= 1 + 2 * longest // len(text)
    made: list[Visit] = []
    for number in range(count):
        length = chance.choice([chance.randint(1, longest), chance.randint(1, 1 + longest // 8)])
        at = chance.randrange(len(text) - longest)
        ids = text[at : at + length]
        if made and chance.random() < 0.5:
            before = chance.choice(made).ids
            ids = (before[: chance.randint(1, len(before))] + ids)[:longest]
        greedy = chance.random() < 0.4
        params = SamplingParams(
            greedy=greedy,
            seed=None if greedy else number,
            top_k=chance.choice([0, 1, 8, 20, 63]),
            top_p=chance.choice([1.0, 0.9]),
            temperature=chance.choice([0.7, 1.0]),
            min_p=chance.choice([0.0, 0.05]),
            presence_penalty=chance.choice([0.0, 0.0, 1.5]),
        )
        mark_at = chance.choice([None, len(ids) - 1, len(ids) // 2])
        leaves = chance.randint(0, answers) if chance.random() < 0.2 else None
        made.append(Visit(ids, params, chance.randint(1, answers), mark_at or None, chance.randint(0, 12), leaves))
    return made


def alone(model: Model, visit: Visit) -> tuple[list[int], Finish]:
    statistics = Statistics()
    return list(model.generate(visit.request(model), statistics)), statistics.finish


def together(engine: Engine, model: Model, schedule: list[Visit]) -> list[tuple[list[int], Finish]]:
    """What each visit gets, read by one thread."""
    streams: list[TokenStream] = []
    for visit in schedule:
        while not all(stream.statistics.finish for stream in streams):
            if sum(stream.statistics.new_tokens for stream in streams) >= visit.after:
                break
            time.sleep(0.001)
        streams.append(engine.submit(visit.request(model)))
    results = []
    for visit, stream in zip(schedule, streams, strict=True):
        tokens: list[int] = []
        if visit.leaves == 0:
            stream.cancel()
        for token in stream:
            tokens.append(token)
            if len(tokens) == visit.leaves:
                stream.cancel()
        results.append((tokens, stream.statistics.finish))
    return results


def differences(expected: list[tuple[list[int], Finish]], got: list[tuple[list[int], Finish]]) -> list[str]:
    """Requests that got something else than alone; one that left got a beginning of it."""
    wrong = []
    for number, ((tokens, finish), (theirs, end)) in enumerate(zip(expected, got, strict=True)):
        whole = end != "cancelled"
        if theirs != tokens[: len(theirs)] or (whole and (theirs, end) != (tokens, finish)):
            at = next((i for i, (a, b) in enumerate(zip(tokens, theirs, strict=False)) if a != b), min(len(tokens), len(theirs)))
            wrong.append(f"request {number}: token {at} of {len(tokens)}, {end or 'no end'} instead of {finish}")
    return wrong
