"""Writing all weights of a graph to one external-data file, in order, without ever holding more than a few blocks.

Three things happen at once: this thread makes blocks (read, fold, convert), one thread writes them, one hashes them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.weights.expression import TensorSource, Weight, weight_of
from qwen_export.manifest import FileEntry

# Page alignment lets a runtime map each tensor straight from the file.
ALIGNMENT = 4096
_IN_FLIGHT = 4

Progress = Callable[[str, int], None]
"""Called with the tensor's name and the bytes just written."""


def weight_bytes(model: ir.Model) -> int:
    """Size of the file that `write_weights` will make, without padding."""
    return sum(weight.nbytes for _, weight in _weights(model))


def write_weights(model: ir.Model, source: TensorSource, path: Path, progress: Progress | None = None) -> FileEntry:
    """Evaluate every lazy weight of `model` into `path` and turn it into external data there. Returns size and SHA-256.

    Peak memory: about eight blocks of 32 MB, or the largest tensor that a transform needs whole."""
    digest = hashlib.sha256()
    pending: deque[Future[object]] = deque()
    offset = 0
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as hasher:

        def put(data: memoryview) -> None:
            pending.append(writer.submit(_write_all, file.write, data))
            pending.append(hasher.submit(digest.update, data))
            while len(pending) > 2 * _IN_FLIGHT:
                pending.popleft().result()

        for value, weight in _weights(model):
            padding = -offset % ALIGNMENT
            if padding:
                put(memoryview(bytes(padding)))
            offset += padding
            begin = offset
            for block in weight.blocks(source):
                data = np.ascontiguousarray(block).view(np.uint8).reshape(-1).data
                put(data)
                offset += data.nbytes
                if progress:
                    progress(value.name or "", data.nbytes)
            if offset - begin != weight.nbytes:
                raise AssertionError(f"weight {value.name} wrote {offset - begin} bytes of {weight.nbytes}")
            value.const_value = ir.ExternalTensor(
                path.name, begin, weight.nbytes, weight.dtype, name=value.name or "", shape=ir.Shape(weight.shape), base_dir=path.parent
            )
        while pending:
            pending.popleft().result()
    return FileEntry(offset, digest.hexdigest())


def _weights(model: ir.Model) -> list[tuple[ir.Value, Weight]]:
    return [(value, weight) for value in model.graph.initializers.values() if (weight := weight_of(value)) is not None]


def _write_all(write: Callable[[memoryview], int | None], data: memoryview) -> None:
    done = 0
    while done < data.nbytes:
        done += write(data[done:]) or 0
