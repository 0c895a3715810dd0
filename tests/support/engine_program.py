"""What an engine of TensorRT-RTX launches, read from its file: needs no GPU, no library, and no build with profiling.

An engine holds the program of its compiler as text, `main { label bb1: function={...} fully_connected={...} signal={...} wait={...} }`.
A `function` is a generated kernel, named after the operations that were fused in it; a `fully_connected` is a product, whose kernel is
chosen when the engine is loaded. `signal` and `wait` are events between two streams. The format is not documented: seen in 1.5 and 1.7.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_START, _END = b"main {\n", b"\0"
_CALL = re.compile(r"^ {2}(\w+)=\{ (.*?)(?=^ {2}\w+=\{|^\s*\}|\Z)", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r'name="?([^\s"]+)')
_SIZE = re.compile(r"grid = \{ ([\d ]+)\} block = \{ ([\d ]+)\}")
_INPUTS, _OUTPUTS = (re.compile(rf"{side}(?:_args)?=\{{([^}}]*)\}}") for side in ("input", "output"))
EVENTS = ("signal", "wait")


@dataclass(frozen=True)
class Call:
    """One line of the program. `inputs` and `outputs` are tensors of the network or of the program; `blocks` and `threads` are 0 where a
    kernel is chosen later."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    blocks: int = 0
    threads: int = 0


def read_program(engine: Path) -> list[Call]:
    """The calls of an engine in their order, none where the file has no program."""
    data = engine.read_bytes()
    starts = [match.start() for match in re.finditer(re.escape(_START), data)]
    return [call for start in starts for call in _calls(data[start : data.find(_END, start)].decode("utf-8", "replace"))]


def _calls(text: str) -> Iterator[Call]:
    for kind, body in _CALL.findall(text):
        name, size = _NAME.search(body), _SIZE.search(body)
        blocks, threads = (_product(part) for part in size.groups()) if size else (0, 0)
        yield Call(kind, name[1] if name else "", _names(_INPUTS, body), _names(_OUTPUTS, body), blocks, threads)


def _names(side: re.Pattern[str], body: str) -> tuple[str, ...]:
    found = side.search(body)
    return tuple(re.findall(r'"([^"]+)"', found[1])) if found else ()


def _product(sizes: str) -> int:
    x, y, z = (int(size) for size in sizes.split())
    return x * y * z
