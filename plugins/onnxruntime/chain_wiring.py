"""The text in which a Chain says how its parts are connected; plugins/native/chain_wiring.h reads the same.

    QuantLinear T0 b0 - T1 > -; DeltaNet v0 T2 f0 f1 T3 T4 f2 > - T0 f0; QuantLinear v1 b1 T5 > T1

A part is the name of an op, its inputs in the op's order, > and its results. An input is T3, b0, f1 or l0: the node's fourth input of the
activations' type, its first of uint8, second of fp32, first of int64; v4: the fifth result of all parts before it, counted through; -: left
out. A result is T0 or f0: the node's first output of that type; -: it stays in the chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

ABSENT, RESULT = "-", "v"
INPUTS = {"T": 64, "b": 24, "f": 48, "l": 4}
"""Inputs of the node by type, in their order, as plugins/native/chain_op.cc declares them."""
OUTPUTS = {"T": 32, "f": 8}
_KINDS = {
    ir.DataType.FLOAT16: "T",
    ir.DataType.BFLOAT16: "T",
    ir.DataType.UINT8: "b",
    ir.DataType.FLOAT: "f",
    ir.DataType.INT64: "l",
}


@dataclass(frozen=True)
class WiredPart:
    """One part: the name of its op, and a word per input and result."""

    op: str
    inputs: tuple[str, ...]
    results: tuple[str, ...]


def write_wiring(parts: Sequence[WiredPart]) -> str:
    return "; ".join(" ".join((part.op, *part.inputs, ">", *part.results)) for part in parts)


def read_wiring(text: str) -> list[WiredPart]:
    parts = []
    for part in text.split(";"):
        given, _, made = part.partition(">")
        op, *inputs = given.split()
        parts.append(WiredPart(op, tuple(inputs), tuple(made.split())))
    return parts


def kind_of(value: ir.Value) -> str | None:
    """The letter of a value's type; None for one that a Chain does not take."""
    return _KINDS.get(value.dtype) if value.dtype is not None else None


def position(word: str, layout: dict[str, int]) -> int:
    """The index of an input (`INPUTS`) or output (`OUTPUTS`) of the node."""
    kinds = list(layout)
    return sum(layout[kind] for kind in kinds[: kinds.index(word[0])]) + int(word[1:])


class Slots:
    """Inputs or outputs of one node, given out by type; a value that is asked for twice has one."""

    def __init__(self, layout: dict[str, int]) -> None:
        self._layout = layout
        self._words: dict[ir.Value, str] = {}
        self._used = dict.fromkeys(layout, 0)

    def word(self, value: ir.Value) -> str | None:
        """`T3`; None where the node has no more of this type, or none at all."""
        if value in self._words:
            return self._words[value]
        kind = kind_of(value)
        if kind is None or self._used.get(kind, self._layout.get(kind, 0)) >= self._layout.get(kind, 0):
            return None
        word = f"{kind}{self._used[kind]}"
        self._used[kind] += 1
        self._words[value] = word
        return word

    def values(self) -> list[ir.Value | None]:
        """All of them at their places, without those that are left out at the end."""
        placed: dict[int, ir.Value] = {position(word, self._layout): value for value, word in self._words.items()}
        return [placed.get(i) for i in range(max(placed, default=-1) + 1)]
