"""One request inside the engine: its text, and what it has given out."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.decoding.prompt_pictures import Features, prompt_read, read_at
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.decoding.sequence import Prompt
from qwen_export.runtimes.decoding.snapshot import Snapshot
from qwen_export.runtimes.sampling.token_history import TokenHistory
from qwen_export.runtimes.serving.token_stream import Inbox
from qwen_export.runtimes.speculation.acceptance import acceptance_for
from qwen_export.runtimes.speculation.drafters import LookupDrafter


class ServedCall:
    """`text` is the prompt and all tokens chosen so far; the decoder has read a beginning of it."""

    def __init__(self, key: int, request: Request, statistics: Statistics, inbox: Inbox) -> None:
        self.key, self.request, self.statistics, self.inbox = key, request, statistics, inbox
        self.text = list(request.ids)
        self.ids = np.asarray(self.text, np.int32)
        """The prompt alone."""
        self.prompt = Prompt(tuple(self.text), request.media)
        self.history = TokenHistory(request.ids)
        self.acceptance = acceptance_for(request.sampler)
        self.choice = request.sampler.choice
        self.encoded: dict[int, Features] = {}
        """What was made of its pictures and videos, by their places among them."""
        self.slot = -1
        self.entered = False
        self.snapshot: Snapshot | None = None
        """What it had read when it lost its slot."""
        self.lookup: LookupDrafter | None = None
        self.points: set[int] = set()
        """Positions of the prompt at which the prefix cache wants a point."""
        self.error: Exception | None = None
        """What a step raised for this call."""
        self.started = time.perf_counter()
        statistics.prompt_tokens = len(self.text)

    @property
    def entering(self) -> bool:
        """Whether the prompt has points that are not read yet."""
        return bool(self.points)

    @property
    def room(self) -> int | None:
        """Tokens that the answer may still have, None without a limit."""
        limit = self.request.max_new_tokens
        return None if limit is None else limit - self.statistics.new_tokens

    def verify(self, start: int, ids: Sequence[int]) -> Read:
        """The open read of token `start` of the text, the last, and of drafts behind it."""
        return read_at(
            self.slot, ids, start, self.request.media, self.request.pictures, logits=len(ids), commit=False, encoded=self.encoded
        )

    def read(self, start: int, stop: int, logits: int = 1) -> Read:
        """The read of tokens `start` .. `stop - 1` of the text."""
        return prompt_read(self.slot, self.text, start, stop, self.request.media, self.request.pictures, logits, self.encoded)

    def give(self, tokens: list[int], now: float) -> list[int]:
        """Tokens of a step that were there at `now`, of which those up to the end of the answer are given out. They join the text;
        `statistics.finish` is set at the end."""
        statistics, request = self.statistics, self.request
        statistics.total_s = now - self.started
        if request.max_new_tokens == 0:
            statistics.finish = "length"
            return []
        statistics.first_token_s = statistics.first_token_s or statistics.total_s
        given: list[int] = []
        for token in tokens:
            if statistics.finish:
                break
            if request.stops_at(token, statistics):
                break
            given.append(token)
            statistics.new_tokens += 1
            if statistics.new_tokens == request.max_new_tokens:
                statistics.finish = "length"
        self.text += given
        return given
