"""Computes the blocks of weights ahead of the writer, in several threads and bounded memory.

Reading releases the interpreter, and so do numpy's loops over a block, so threads are enough to use all cores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from qwen_export.graphs.weights.expression import Array, TensorSource, Weight

BUDGET_BYTES = 192 << 20
"""Bytes that blocks may hold which wait to be written, finished or not."""


@dataclass(frozen=True)
class Block:
    """A part of a weight's bytes, in order; `last` of its weight."""

    data: memoryview
    last: bool


class ReadAhead:
    """Blocks of weights, made by `jobs` threads."""

    def __init__(self, source: TensorSource, jobs: int, budget: int = BUDGET_BYTES) -> None:
        self._source, self._budget = source, budget
        self._pool = ThreadPoolExecutor(jobs, thread_name_prefix="weights")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def blocks(self, weights: Iterable[Weight]) -> Iterator[Block]:
        """All blocks of all weights, one weight after the other. A block is valid until the next one is taken."""
        waiting: deque[tuple[Future[memoryview], int, bool]] = deque()
        held = 0
        for weight in weights:
            spans = weight.spans()
            for number, (start, stop) in enumerate(spans):
                size = block_bytes(weight, start, stop)
                while waiting and held + size > self._budget:
                    future, freed, last = waiting.popleft()
                    yield Block(future.result(), last)
                    held -= freed
                waiting.append((self._pool.submit(partial(_make, weight, self._source, start, stop)), size, number == len(spans) - 1))
                held += size
        while waiting:
            future, _, last = waiting.popleft()
            yield Block(future.result(), last)


def block_bytes(weight: Weight, start: int, stop: int) -> int:
    """Bytes that a block may need while it is computed: itself in fp32, the stored values, and the result."""
    return 3 * 4 * weight.elements(start, stop)


def _make(weight: Weight, source: TensorSource, start: int, stop: int) -> memoryview:
    block: Array = np.ascontiguousarray(weight.rows(source, start, stop))
    return block.view(np.uint8).reshape(-1).data
