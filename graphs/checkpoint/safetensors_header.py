"""The header of a safetensors file, read strictly and without touching the data.

Format: 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the data, which the tensors must fill
without gaps or overlaps. The safetensors library maps whole files and reports damage in its own words; this reads a few kilobytes and
names the file and the tensor.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from qwen_export.errors import CheckpointError

# Bytes per element of the format's types, those of less than a byte left out.
ITEM_SIZE = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1},
}
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` in bytes from the start of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZE[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a file. Raises CheckpointError for a file that is cut off, lies about its sizes, or has overlapping tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    "the safetensors header is longer than the file",
                    where=str(path),
                    got=f"header length {length} in a file of {size} bytes",
                    fix="Copy or download the file again.",
                )
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError("a weight file is missing", where=str(path), fix="Copy or download it again.") from None
    except OSError as error:
        raise CheckpointError("a weight file cannot be read", where=str(path), got=os.strerror(error.errno or 0)) from error
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            "the safetensors header is not valid JSON", where=str(path), got=error, fix="Copy or download the file again."
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError("the safetensors header is not a JSON object", where=str(path), got=type(entries).__name__)
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in entries.items() if name != "__metadata__"]
    _check_layout(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different; json itself would silently keep the last."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _tensor(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    where = f"{path}, tensor {name}"
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError("a tensor of the safetensors header has no usable dtype, shape and data_offsets", where=where)
    if dtype not in ITEM_SIZE:
        raise CheckpointError("unknown element type", where=where, got=dtype, expected=", ".join(ITEM_SIZE))
    begin, end = offsets
    tensor = TensorInfo(name, path, dtype, shape, base + begin)
    if end - begin != tensor.nbytes:
        raise CheckpointError(
            "a tensor's bytes do not match its shape", where=where, got=f"{end - begin} bytes", expected=f"{tensor.nbytes}"
        )
    return tensor


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A JSON list of whole numbers >= 0; None for anything else."""
    return tuple(value) if isinstance(value, list) and all(type(n) is int and n >= 0 for n in value) else None


def _check_layout(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    ordered = sorted(tensors, key=lambda t: (t.offset, t.nbytes))
    for before, after in pairwise(ordered):
        if after.offset < before.offset + before.nbytes:
            raise CheckpointError("two tensors overlap", where=str(path), got=f"{before.name} and {after.name}", fix="The file is damaged.")
        if after.offset > before.offset + before.nbytes:
            raise CheckpointError("the file has a hole between two tensors", where=str(path), got=f"after {before.name}")
    end = ordered[-1].offset + ordered[-1].nbytes if ordered else start
    if ordered and ordered[0].offset != start:
        raise CheckpointError("the file has a hole before its first tensor", where=str(path), got=ordered[0].name)
    if end != size:
        what = "the file is cut off" if size < end else "the file is longer than its tensors"
        raise CheckpointError(what, where=str(path), got=f"{size} bytes", expected=f"{end}", fix="Copy or download the file again.")
