"""Writing all weights of a graph to one external-data file, in order, without ever holding more than a few blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def weight_bytes(models: Iterable[ir.Model]) -> int:
    """Size of the file that `write_weights` will make, without padding."""
    return sum(weight.nbytes for weight in {name: weight for name, _, weight in _weights(models)}.values())


def write_weights(models: Iterable[ir.Model], source: TensorSource, path: Path, progress: Progress | None = None) -> FileEntry:
    """Evaluate every lazy weight of the models into `path` and turn it into external data there. Returns size and SHA-256. Models share
    what has the same name, which then is the same weight.

    Peak memory: a few blocks of 4 MB, or the largest tensor that a transform needs whole."""
    written: dict[str, tuple[Weight, ir.ExternalTensor]] = {}
    with HashedFile(path) as file:
        for name, value, weight in _weights(models):
            if name in written:
                other, tensor = written[name]
                if other != weight:
                    raise AssertionError(f"two weights have the name {name}")
                value.const_value = tensor
                continue
            file.write(memoryview(bytes(-file.size % ALIGNMENT)))
            begin = file.size
            for block in weight.blocks(source):
                data = np.ascontiguousarray(block).view(np.uint8).reshape(-1).data
                file.write(data)
                if progress:
                    progress(name, data.nbytes)
            if file.size - begin != weight.nbytes:
                raise AssertionError(f"weight {name} wrote {file.size - begin} bytes of {weight.nbytes}")
            tensor = ir.ExternalTensor(
                path.name, begin, weight.nbytes, weight.dtype, name=name, shape=ir.Shape(weight.shape), base_dir=path.parent
            )
            value.const_value = tensor
            written[name] = weight, tensor
    return file.entry


def _weights(models: Iterable[ir.Model]) -> list[tuple[str, ir.Value, Weight]]:
    return [
        (value.name or "", value, weight)
        for model in models
        for value in model.graph.initializers.values()
        if (weight := weight_of(value)) is not None
    ]
