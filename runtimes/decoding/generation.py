"""Generation: rounds of new tokens, given out until something ends the answer. A plain round is one sampled token."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

from qwen_export.errors import ContextOverflow
from qwen_export.runtimes.decoding.flight import Flight
from qwen_export.runtimes.decoding.logit_rows import Rows
from qwen_export.runtimes.decoding.prefix_reuse import PrefixReuse
from qwen_export.runtimes.decoding.prompt_pictures import PromptPictures
from qwen_export.runtimes.decoding.sequence import Media, Prompt
from qwen_export.runtimes.sampling.logprobs import PromptRecorder
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.sampling.token_history import TokenHistory

Finish = Literal["", "stop", "length", "cancelled", "superseded", "abandoned", "deadline", "overflow", "error"]
"""Why an answer ended: at a stop token or stop string; after max_new_tokens; by `cancel()`; because the same model began another answer;
because its iterator was closed; at its deadline; because the context is full (ContextOverflow is raised); because something else was
raised."""


@dataclass
class SpeculationStatistics:
    """The results of drafting. A round is one decoder call; times in seconds, draft and verify those of the backend alone."""

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
    """The cost of one answer. Times in seconds from the request."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    queued_s: float = 0.0
    """Until an engine gave the request a slot."""
    first_token_s: float = 0.0
    total_s: float = 0.0
    finish: Finish = ""
    """Why it ended; "" while it runs."""
    stop_reason: str | int | None = None
    """The stop string, or the token of `Request.named_stop_ids`, that ended it; None for the model's own end and all others."""
    reasoning_tokens: int = 0
    """Those of the new tokens that are reasoning, its closing tag among them; known to the reader of the answer's text."""
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
    """A prompt, and when to stop. `media` are its pictures and videos, `pictures` is what stands for their tokens. `mark_at`: tokens of the
    prompt that the next turn's prompt will begin with; `user_turn`: they end with a turn of the user. `deadline`: seconds of
    `time.monotonic()` after which an engine ends the answer. `progress` is called while the prompt is read, with the tokens read so far
    and all of them. `named_stop_ids`: those of `stop_ids` that the caller named."""

    ids: Sequence[int]
    sampler: Sampler
    stop_ids: Collection[int]
    max_new_tokens: int | None = None
    mark_at: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    reason: Finish = "cancelled"
    """What `Statistics.finish` becomes when `cancelled` is set."""
    media: tuple[Media, ...] = ()
    pictures: PromptPictures | None = None
    progress: Callable[[int, int], None] | None = None
    user_turn: bool = True
    deadline: float | None = None
    named_stop_ids: Collection[int] = ()
    prompt_recorder: PromptRecorder | None = None
    """Gets the logits of all tokens of the prompt, which is then read from its start."""
    group: object | None = None
    """Requests of one group have one prompt: an engine reads it once."""

    def stops_at(self, token: int, statistics: Statistics) -> bool:
        """Whether a token ends the answer, which it is not part of; notes the reason."""
        if token not in self.stop_ids:
            return False
        statistics.finish = "stop"
        statistics.stop_reason = token if token in self.named_stop_ids else None
        return True

    def go_on(self, read: int) -> bool:
        """Between two parts of the prompt: whether to read the next one."""
        if self.progress is not None:
            self.progress(read, len(self.ids))
        return not self.cancelled.is_set()


class Round(NamedTuple):
    """Tokens that a round produced. When they come from a verify the decoder has read all of them but the last, else none."""

    tokens: list[int]
    verified: bool = False


NextRound = Callable[[int], Round]
"""The round behind a token, which the decoder has not read yet. When it raises, the decoder still has not read it, or the sequence is not
settled."""
Rounds = Callable[[PrefixReuse, Request, Statistics, TokenHistory], NextRound]


class PlainRounds:
    """One token after the other."""

    def __init__(self, reuse: PrefixReuse, request: Request, statistics: Statistics, history: TokenHistory) -> None:
        self._decoder, self._slot, self._sampler, self._history = reuse.decoder, reuse.slot, request.sampler, history
        self._flight = Flight()

    def begin(self, token: int) -> None:
        """Launch the round behind a token, which is given out meanwhile."""
        self._history.push(token)
        self._flight.launch(partial(self._launch, token))

    def _launch(self, token: int) -> Callable[[], Rows]:
        self._sampler.ahead(self._history)
        return self._decoder.launch((token,), self._slot)

    def __call__(self, token: int) -> Round:
        if not self._flight.flies:
            self.begin(token)
        return Round([self._sampler.sample(self._flight.land()[0], self._history)])

    def abandon(self) -> None:
        """Wait for a round that is not wanted: the decoder has read the token then."""
        self._flight.abandon()


def generate(reuse: PrefixReuse, request: Request, statistics: Statistics, rounds: Rounds = PlainRounds) -> Generator[int, None, None]:
    """Yield new token ids, without the stop token. Ends at a stop id, after max_new_tokens, or when cancelled between two tokens or two
    parts of the prompt; raises ContextOverflow when the context is full before that. `statistics.finish` names the reason."""
    try:
        yield from _tokens(reuse, request, statistics, rounds)
    except ContextOverflow:
        statistics.finish = "overflow"
        raise
    except GeneratorExit:
        statistics.finish = statistics.finish or "abandoned"
        raise
    except BaseException:
        statistics.finish = "error"
        raise


def _tokens(reuse: PrefixReuse, request: Request, statistics: Statistics, rounds: Rounds) -> Generator[int, None, None]:
    started = time.perf_counter()
    statistics.prompt_tokens = len(request.ids)
    history = TokenHistory(request.ids)
    prompt = Prompt(tuple(request.ids), request.media)
    read = reuse.read(prompt, request.mark_at, request.go_on, request.prompt_recorder, request.pictures)
    statistics.reused_tokens = read.reused
    if read.rows is None:
        statistics.finish = request.reason
        return
    if request.max_new_tokens == 0:
        statistics.finish, statistics.total_s = "length", time.perf_counter() - started
        return
    following = rounds(reuse, request, statistics, history)
    launches = reuse.decoder.launches and not request.media
    ahead = following if isinstance(following, PlainRounds) and launches else None
    made, emitted = Round([request.sampler.sample(read.rows[0], history)]), 0
    try:
        while True:
            statistics.total_s = time.perf_counter() - started
            statistics.first_token_s = statistics.first_token_s or statistics.total_s
            for emitted, token in enumerate(made.tokens):  # noqa: B007 - read in `finally`
                if request.stops_at(token, statistics):
                    return
                statistics.new_tokens += 1
                if statistics.new_tokens == request.max_new_tokens:
                    statistics.finish = "length"
                elif ahead is not None:
                    ahead.begin(token)
                yield token
                if request.cancelled.is_set():
                    statistics.finish = request.reason
                if statistics.finish:
                    return
            last, made = made.tokens[-1], Round([])
            made = following(last)
    finally:
        # An answer that ends inside a round leaves the decoder where plain decoding does: the last token given out is not read yet.
        # One that its reader ends while the next round is under way has read it.
        if made.verified:
            reuse.decoder.accept(emitted + 1, reuse.slot)
        if ahead is not None:
            ahead.abandon()
