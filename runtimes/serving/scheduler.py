"""What each step reads: a pure planner. It knows counts of tokens, not what they are, and runs no model.

A job is a sequence with `known` tokens, of which `read` are in a slot. A step reads the last token of all jobs that have one left, and
parts of the others' texts under a budget of tokens. A prompt, an answer, and a text that is read again after an error are the same thing.

Order is by arrival. The oldest job present is admitted first and never preempted, so every job ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from qwen_export.errors import ParameterError


class Part(NamedTuple):
    """`tokens` of a job's text, to be read in one call."""

    key: int
    tokens: int


class Step(NamedTuple):
    """What one step reads: the last token of each job in `rows`, and `parts` of texts."""

    rows: list[int]
    parts: list[Part]


class Changes(NamedTuple):
    """Jobs that leave their slots, and jobs that enter one, with the slot. Leaving comes first."""

    leave: list[int]
    enter: list[tuple[int, int]]


@dataclass(slots=True)
class Job:
    """`cuts`: positions, ascending, where a read must end. `bound`: tokens that may be read now, None for all. `reserve`: tokens that the
    job is expected to add soon."""

    key: int
    known: int
    read: int = 0
    slot: int | None = None
    cuts: tuple[int, ...] = ()
    bound: int | None = None
    reserve: int = 0

    @property
    def left(self) -> int:
        return self.known - self.read

    @property
    def readable(self) -> int:
        """Tokens that may be read now."""
        return self.left if self.bound is None else min(self.left, self.bound - self.read)


class Scheduler:
    """`slots` places and `limit` bytes for their sequences; `cost(n)` is what one of n tokens takes. `ahead`: tokens that a step may add
    to a sequence. `chunk`: tokens that one read has at most."""

    def __init__(self, slots: int, limit: int, cost: Callable[[int], int], chunk: int, ahead: int = 1) -> None:
        self._limit, self._cost, self._chunk, self._ahead = limit, cost, chunk, ahead
        self._free = list(range(slots))
        self._waiting: list[int] = []
        self._jobs: dict[int, Job] = {}
        self.running: dict[int, Job] = {}
        """Jobs that have a slot, by key."""
        self._turn = 0

    # ---- what happened ----

    def add(self, key: int, known: int, reserve: int = 0) -> None:
        """A job with `known` tokens arrives. Keys grow with time. Raises ParameterError for one that would never fit."""
        if self._cost(known + self._ahead) > self._limit:
            raise ParameterError(
                "the sequence needs more memory than all sequences may have together",
                parameter="cache_memory",
                got=f"{self._cost(known + self._ahead)} bytes",
                expected=f"at most {self._limit} bytes",
                fix="Raise {cache_memory}, or shorten the prompt.",
            )
        self._jobs[key] = Job(key, known, reserve=reserve)
        heappush(self._waiting, key)

    def entered(self, key: int, read: int, cuts: Iterable[int] = ()) -> None:
        """The slot of a job holds the first `read` tokens of its text already."""
        job = self.running[key]
        job.read, job.cuts = read, tuple(sorted(cut for cut in cuts if read < cut < job.known))

    def bind(self, key: int, bound: int | None) -> None:
        """A running job may be read up to a position for now; None takes that back."""
        self.running[key].bound = bound

    def has(self, key: int, read: int, known: int) -> None:
        """The counts of a job after a step."""
        job = self._jobs[key]
        job.read, job.known, job.reserve = read, known, max(0, job.reserve - max(0, known - job.known))

    def send_back(self, key: int) -> None:
        """A job loses its slot, and waits to enter one again."""
        self._release(self.running.pop(key))
        heappush(self._waiting, key)

    def remove(self, key: int) -> None:
        """A job has ended, wherever it was."""
        job = self._jobs.pop(key)
        if self.running.pop(key, None) is not None:
            self._release(job)
        else:
            self._waiting.remove(key)
            heapify(self._waiting)

    def _release(self, job: Job) -> None:
        assert job.slot is not None
        heappush(self._free, job.slot)
        job.slot, job.read, job.cuts, job.bound = None, 0, (), None

    # ---- what is next ----

    @property
    def rows(self) -> list[int]:
        """Jobs of whose text one token is left."""
        return [job.key for job in self.running.values() if job.left == 1 and job.readable]

    @property
    def texts(self) -> list[Job]:
        """Jobs with more of a text to read, the oldest first."""
        return sorted((job for job in self.running.values() if job.left > 1 and job.readable > 0), key=lambda job: job.key)

    @property
    def waiting(self) -> int:
        """Number of jobs without a slot."""
        return len(self._waiting)

    @property
    def held(self) -> int:
        """Bytes that running jobs have, or will have when their texts are read."""
        return sum(self._cost(job.known + self._ahead) for job in self.running.values())

    @property
    def stays(self) -> bool:
        """Whether all running jobs fit when each has two more tokens."""
        return sum(self._cost(job.known + self._ahead + 2) for job in self.running.values()) <= self._limit

    def admit(self) -> Changes:
        """Before a step. The youngest leave while memory is short; then the oldest that wait enter while there is a slot and memory. No
        job overtakes an older one, or small ones would keep a large one out."""
        leave: list[int] = []
        held = self.held
        while held > self._limit and len(self.running) > 1:
            youngest = max(self.running)
            held -= self._cost(self.running[youngest].known + self._ahead)
            self.send_back(youngest)
            leave.append(youngest)
        enter: list[tuple[int, int]] = []
        while self._waiting and self._free and not leave:
            job = self._jobs[self._waiting[0]]
            need = self._cost(job.known + self._ahead + job.reserve)
            if self.running and held + need > self._limit:
                break
            heappop(self._waiting)
            job.slot = heappop(self._free)
            self.running[job.key] = job
            held += self._cost(job.known + self._ahead)
            enter.append((job.key, job.slot))
        return Changes(leave, enter)

    def plan(self, budget: int, least: int = 1) -> Step:
        """The next step: `budget` tokens of texts, of which each part counts at least `least`. Every step reads some of a text, if there
        is one that may be read. The oldest text and the one that is nearest to its end take turns to be first: a long prompt neither
        waits for ever nor makes all others wait."""
        rows, texts = self.rows, self.texts
        if not texts:
            return Step(rows, [])
        self._turn ^= 1
        if self._turn == 0:
            nearest = min(texts, key=lambda job: job.left)
            texts.remove(nearest)
            texts.insert(0, nearest)
        parts: list[Part] = []
        for job in texts:
            if parts and budget < least:
                break
            count = self._part(job, max(1, min(budget, self._chunk)))
            parts.append(Part(job.key, count))
            budget -= max(count, least)
        return Step(rows, parts)

    @staticmethod
    def _part(job: Job, most: int) -> int:
        """Tokens of a job's next read: up to its next cut."""
        end = next((cut for cut in job.cuts if cut > job.read), job.known)
        return min(most, end - job.read, job.readable)
