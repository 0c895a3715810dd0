"""Generation: rounds of new tokens, given out until something ends the answer. A plain round is one sampled token."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.prefix_reuse import PrefixReuse
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.sampling.token_history import TokenHistory


@dataclass
class SpeculationStatistics:
    """What drafting came to. A round is one decoder call; times in seconds, draft and verify those of the backend alone."""

    rounds: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    """Rounds that had a draft at position 1, 2, ..."""
    accepted: list[int] = field(default_factory=list)
    """Those of them in which it was kept."""
    draft_s: float = 0.0
    verify_s: float = 0.0
    host_s: float = 0.0

    def add(self, drafted: int, accepted: int, draft_s: float, verify_s: float) -> None:
        self.rounds += 1
        self.tokens += accepted + 1
        for table, count in ((self.drafted, drafted), (self.accepted, accepted)):
            table += [0] * (drafted - len(table))
            for i in range(count):
                table[i] += 1
        self.draft_s += draft_s
        self.verify_s += verify_s

    @property
    def tokens_per_round(self) -> float:
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Share of the drafts at position 1, 2, ... that were kept."""
        return [a / d for a, d in zip(self.accepted, self.drafted, strict=True)]


@dataclass
class Statistics:
    """What one answer cost. Times in seconds from the request."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    read_tokens: int = 0
    """Tokens of the prompt that are in the decoder so far; grows while the prompt is read."""
    new_tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0
    finish: str = ""
    """Why it ended: "stop", "length" or "cancelled"; "" while it runs."""
    speculation: SpeculationStatistics = field(default_factory=SpeculationStatistics)

    @property
    def decode_tok_per_s(self) -> float:
        """New tokens per second after the first."""
        span = self.total_s - self.first_token_s
        return (self.new_tokens - 1) / span if self.new_tokens > 1 and span > 0 else 0.0

    @property
    def prefill_tok_per_s(self) -> float:
        read = self.prompt_tokens - self.reused_tokens
        return read / self.first_token_s if self.first_token_s > 0 else 0.0


@dataclass
class Request:
    """A prompt as token ids, and when to stop. `mark_at`: tokens of the prompt that the next turn's prompt will begin with."""

    ids: Sequence[int]
    sampler: Sampler
    stop_ids: Collection[int]
    max_new_tokens: int | None = None
    mark_at: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


class Round(NamedTuple):
    """Tokens that a round produced. After a verify the decoder has read all of them but the last, else none of them."""

    tokens: list[int]
    verified: bool = False


NextRound = Callable[[int], Round]
"""The round behind a token, which the decoder has not read yet."""
Rounds = Callable[[Decoder, Request, Statistics, TokenHistory], NextRound]


def plain_rounds(decoder: Decoder, request: Request, statistics: Statistics, history: TokenHistory) -> NextRound:
    """One token after the other."""

    def following(token: int) -> Round:
        history.push(token)
        return Round([request.sampler.sample(decoder.step_rows([token])[0], history)])

    return following


def generate(reuse: PrefixReuse, request: Request, statistics: Statistics, rounds: Rounds = plain_rounds) -> Generator[int, None, None]:
    """Yield new token ids, without the stop token. Ends at a stop id, after max_new_tokens, or when cancelled between two tokens; raises
    ContextOverflow when the context is full before that."""
    started = time.perf_counter()
    statistics.prompt_tokens = len(request.ids)
    decoder, history = reuse.decoder, TokenHistory(request.ids)

    def counted(count: int) -> None:
        statistics.read_tokens = count

    logits, statistics.reused_tokens = reuse.read(request.ids, request.mark_at, counted)
    following = rounds(decoder, request, statistics, history)
    made, emitted = Round([request.sampler.sample(logits, history)]), 0
    try:
        while True:
            statistics.total_s = time.perf_counter() - started
            statistics.first_token_s = statistics.first_token_s or statistics.total_s
            for emitted, token in enumerate(made.tokens):  # noqa: B007 - read in `finally`
                if token in request.stop_ids:
                    statistics.finish = "stop"
                    return
                statistics.new_tokens += 1
                if statistics.new_tokens == request.max_new_tokens:
                    statistics.finish = "length"
                yield token
                if request.cancelled.is_set():
                    statistics.finish = "cancelled"
                if statistics.finish:
                    return
            made = following(made.tokens[-1])
    finally:
        # Whoever stops inside a round finds the decoder where plain decoding leaves it: the last token given out is not read yet.
        if made.verified:
            decoder.accept(emitted + 1)
