"""Weights that a graph refers to, copied into a file of the bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import onnx_ir as ir

from qwen_export.errors import BundleError
from qwen_export.graphs.checkpoint.file_access import SharedFile
from qwen_export.graphs.weights.hashed_file import HashedFile
from qwen_export.graphs.weights.weight_writer import ALIGNMENT
from qwen_export.manifest import FileEntry

_CHUNK = 4 << 20

Places = dict[tuple[str, int], int]
"""Name of a note and offset in its file, to the offset in the new file."""


def copy_referred(
    models: Sequence[ir.Model], files: Mapping[str, Path], path: Path, progress: Callable[[str, int], None]
) -> tuple[FileEntry, Places]:
    """Copy every external tensor whose location is one of `files` to `path`, shared ones once, and point the graphs there."""
    places: Places = {}
    sizes: dict[tuple[str, int], int] = {}
    referred = [
        (value, tensor, (str(tensor.location), tensor.offset or 0))
        for model in models
        for value in model.graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor) and str(tensor.location) in files
    ]
    for _, tensor, place in referred:  # a graph may use only the front of a weight
        sizes[place] = max(sizes.get(place, 0), tensor.nbytes)
    with HashedFile(path) as out:
        for value, tensor, place in referred:
            name = value.name or ""
            if place not in places:
                out.write(memoryview(bytes(-out.size % ALIGNMENT)))
                places[place] = out.size
                _copy(files[place[0]], place[1], sizes[place], out, partial(progress, name))
            value.const_value = ir.ExternalTensor(
                path.name, places[place], tensor.nbytes, tensor.dtype, name=name, shape=tensor.shape, base_dir=path.parent
            )
    return out.entry, places


def _copy(source: Path, offset: int, size: int, out: HashedFile, progress: Callable[[int], None]) -> None:
    file = SharedFile(source)
    try:
        buffer = memoryview(bytearray(min(_CHUNK, size)))
        for done in range(0, size, _CHUNK):
            part = buffer[: min(_CHUNK, size - done)]
            if not file.read_into(part, offset + done):
                raise BundleError(
                    "a checkpoint file that the bundle refers to ends too early",
                    where=str(source),
                    fix="Copy or download the checkpoint again, and build the bundle again.",
                )
            out.write(part)
            progress(len(part))
    finally:
        file.close()
