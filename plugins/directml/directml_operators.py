"""The operators that DirectML's execution provider has kernels for: operators.json, with its source and date.

ONNX Runtime takes a kernel for a node when the kernel was registered for exactly the version in which the standard last changed the
operator, as seen from the graph's opset; a newer version of an operator is another operator. The node then silently runs on the CPU,
with copies before and after it. So the version decides, not the name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class DirectmlKernel:
    """One registration: first and last operator version, and the element types of its type variables."""

    first: int
    last: int
    types: dict[str, frozenset[str]]


@dataclass(frozen=True)
class Operator:
    """All registrations of an operator. `inputs` and `outputs` name the type variables where the standard has no schema."""

    kernels: tuple[DirectmlKernel, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def kernel(self, version: int) -> DirectmlKernel | None:
        return next((kernel for kernel in self.kernels if kernel.first <= version <= kernel.last), None)


@dataclass(frozen=True)
class OperatorTable:
    """`operators` by (domain, name); "" is the standard's domain."""

    source: str
    date: str
    operators: dict[tuple[str, str], Operator]


@cache
def operator_table() -> OperatorTable:
    raw = json.loads(resources.files("qwen_export.plugins.directml").joinpath("operators.json").read_text(encoding="utf-8"))
    types = {name: frozenset(members) for name, members in raw["types"].items()}

    def operator(entry: dict[str, list[list[object]]]) -> Operator:
        kernels = tuple(
            DirectmlKernel(first, last, {variable: types[name] for variable, name in names.items()})  # type: ignore[arg-type, attr-defined]
            for first, last, names in entry["kernels"]
        )
        return Operator(kernels, tuple(map(str, entry.get("inputs", []))), tuple(map(str, entry.get("outputs", []))))

    operators = {(domain, name): operator(entry) for domain, entries in raw["operators"].items() for name, entry in entries.items()}
    return OperatorTable(raw["source"], raw["date"], operators)
