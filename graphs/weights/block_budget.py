"""How much memory the blocks of a build may hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from qwen_export.errors import BuildError
from qwen_export.graphs.weights.read_ahead import BUDGET_BYTES, block_bytes
from qwen_export.graphs.weights.weight_writer import distinct_weights

# Buffers of the reader and the writer, scales that are kept, and what allocators hold on to.
_AROUND_BYTES = 192 << 20


def block_budget(models: Sequence[ir.Model], max_memory: int | None) -> int:
    """The bytes that blocks may hold, so that the process stays below `max_memory` bytes; a small number where that is not given. An expert
    is one block, 100 MB in the 397B, so many cores need more.

    Raises BuildError when the largest block of the graphs does not fit."""
    if max_memory is None:
        return BUDGET_BYTES
    largest = max((block_bytes(weight, start, stop) for weight in distinct_weights(models) for start, stop in weight.spans()), default=0)
    budget = max_memory - _resident() - _AROUND_BYTES
    if budget < largest:
        raise BuildError(
            "the build needs more memory than {max_memory} allows",
            got=f"{max_memory / 1e9:g} GB",
            expected=f"at least {(max_memory - budget + largest) / 1e9:.2f} GB",
            fix="Raise {max_memory}.",
        )
    return budget


def _resident() -> int:
    """Bytes of memory of this process, 0 where the system does not report it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
