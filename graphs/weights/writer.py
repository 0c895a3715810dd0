"""Writing all weights of a graph to one external-data file, in order, without ever holding more than a few blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.weights.expression import TensorSource, Weight, weight_of
from qwen_export.graphs.weights.hashed_file import HashedFile
from qwen_export.manifest import FileEntry

# Page alignment lets a runtime map each tensor straight from the file.
ALIGNMENT = 4096

Progress = Callable[[str, int], None]
"""Called with the tensor's name and the bytes just written."""


def weight_bytes(model: ir.Model) -> int:
    """Size of the file that `write_weights` will make, without padding."""
    return sum(weight.nbytes for _, weight in _weights(model))


def write_weights(model: ir.Model, source: TensorSource, path: Path, progress: Progress | None = None) -> FileEntry:
    """Evaluate every lazy weight of `model` into `path` and turn it into external data there. Returns size and SHA-256.

    Peak memory: a few blocks of 4 MB, or the largest tensor that a transform needs whole."""
    with HashedFile(path) as file:
        for value, weight in _weights(model):
            file.write(memoryview(bytes(-file.size % ALIGNMENT)))
            begin = file.size
            for block in weight.blocks(source):
                data = np.ascontiguousarray(block).view(np.uint8).reshape(-1).data
                file.write(data)
                if progress:
                    progress(value.name or "", data.nbytes)
            if file.size - begin != weight.nbytes:
                raise AssertionError(f"weight {value.name} wrote {file.size - begin} bytes of {weight.nbytes}")
            value.const_value = ir.ExternalTensor(
                path.name, begin, weight.nbytes, weight.dtype, name=value.name or "", shape=ir.Shape(weight.shape), base_dir=path.parent
            )
    return file.entry


def _weights(model: ir.Model) -> list[tuple[ir.Value, Weight]]:
    return [(value, weight) for value in model.graph.initializers.values() if (weight := weight_of(value)) is not None]
