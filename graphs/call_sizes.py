"""The graphs of a bundle: what each is traced from, and the sizes of those that are compiled for calls of one shape."""

from __future__ import annotations

from dataclasses import dataclass

DECODER, HEAD, TOWER = "decoder", "mtp", "vision"
"""The modules that graphs are traced from."""


@dataclass(frozen=True)
class CallSizes:
    """The sizes of a graph with static shapes, which reads one sequence: T new tokens, P pending ones, S cache slots, N rows of logits:
    all T, none, or 1 that `logit_rows` chooses. `padded`: a call may have fewer than T real tokens; `commit` is their number. `hidden`:
    a graph reads the hidden states. `chunk`: tokens that the delta rule takes at a time. Of a tower: T tokens of a slice."""

    T: int
    P: int
    S: int
    N: int
    padded: bool
    hidden: bool = False
    chunk: int = 64


@dataclass(frozen=True)
class GraphPlan:
    """One graph: the module it is traced from, and the sizes of its calls; None where they are free."""

    module: str
    sizes: CallSizes | None = None
