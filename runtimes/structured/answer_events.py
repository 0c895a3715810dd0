"""What an answer consists of, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AnswerKind = Literal["reasoning", "answer"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that could stand at a place: its id, its bytes, which may be half a character, and its log probability."""

    id: int
    text: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob(Candidate):
    """The token that was chosen, and the likeliest ones in descending order, which may hold it."""

    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerEvent:
    """A piece of the reasoning or of the answer. `tokens`, where log probabilities were wanted: those that came since the last event of the
    kind. All events together have each token once, in order; an event may have tokens and no text, such as those of tags."""

    kind: AnswerKind
    text: str
    tokens: tuple[TokenLogprob, ...] = ()
