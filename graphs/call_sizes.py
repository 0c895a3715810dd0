"""The sizes of a graph that is compiled for calls of one shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CallSizes:
    """The sizes of a graph with static shapes, which reads one sequence: T new tokens, P pending ones, S cache slots, N rows of logits:
    all T or none. `padded`: a call may have fewer than T real tokens, and says so in `commit`. `hidden`: a draft head reads the hidden
    states. `chunk`: tokens that the delta rule takes at a time."""

    T: int
    P: int
    S: int
    N: int
    padded: bool
    hidden: bool = False
    chunk: int = 64
