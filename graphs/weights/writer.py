"""Writing all weights of a bundle's graphs to one external-data file, in order, without ever holding more than a few blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.weights.expression import FirstRows, TensorSource, Weight, weight_of
from qwen_export.graphs.weights.hashed_file import HashedFile
from qwen_export.manifest import FileEntry

# Page alignment lets a runtime map each tensor straight from the file.
ALIGNMENT = 4096

Progress = Callable[[str, int], None]
"""Called with the tensor's name and the bytes just written."""


def weight_bytes(models: Sequence[ir.Model]) -> int:
    """Size of the file that `write_weights` will make, without padding."""
    return sum(weight.nbytes for weight in {weight: None for _, weight in _weights(models)} if _whole(weight) is weight)


def write_weights(models: Sequence[ir.Model], source: TensorSource, path: Path, progress: Progress | None = None) -> FileEntry:
    """Evaluate every lazy weight of the graphs into `path`, equal ones once, and turn them into external data there. Returns size and hash.

    Peak memory: a few blocks of 4 MB, or the largest tensor that a transform needs whole."""
    written: dict[Weight, int] = {}
    with HashedFile(path) as file:
        for value, weight in _weights(models):
            stored = _whole(weight)
            if stored not in written:
                file.write(memoryview(bytes(-file.size % ALIGNMENT)))
                written[stored] = file.size
                _append(file, stored, source, value.name or "", progress)
            value.const_value = ir.ExternalTensor(
                path.name,
                written[stored],
                weight.nbytes,
                weight.dtype,
                name=value.name or "",
                shape=ir.Shape(weight.shape),
                base_dir=path.parent,
            )
    return file.entry


def _append(file: HashedFile, weight: Weight, source: TensorSource, name: str, progress: Progress | None) -> None:
    begin = file.size
    for block in weight.blocks(source):
        data = np.ascontiguousarray(block).view(np.uint8).reshape(-1).data
        file.write(data)
        if progress:
            progress(name, data.nbytes)
    if file.size - begin != weight.nbytes:
        raise AssertionError(f"weight {name} wrote {file.size - begin} bytes of {weight.nbytes}")


def _whole(weight: Weight) -> Weight:
    """What is stored for a weight: rows at the front of another are read where that one lies."""
    return weight.of if isinstance(weight, FirstRows) else weight


def _weights(models: Sequence[ir.Model]) -> list[tuple[ir.Value, Weight]]:
    values = (value for model in models for value in model.graph.initializers.values())
    return [(value, weight) for value in values if (weight := weight_of(value)) is not None]
