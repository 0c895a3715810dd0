"""The header of a safetensors file, read strictly and without touching the data.

Format: 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the data, which the tensors must fill
without gaps or overlaps. The safetensors library maps whole files and does not name the file that is damaged. This reads a few kilobytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import prod
from pathlib import Path
from typing import Any

from qwen_export.element_types import BY_SAFETENSORS
from qwen_export.errors import CheckpointError
from qwen_export.graphs.json_file import AGAIN, LFS_POINTER, refuse_pointer

ITEM_SIZE = {name: kind.bits // 8 for name, kind in BY_SAFETENSORS.items()}
"""Bytes per element of the types of the format."""

_MAX_HEADER = 100 << 20
_MAX_AXES = 16
_SMALL = 64


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is stored: `offset` in bytes from the start of `file`. `stored_name` is its name there, where that is not `name`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    stored_name: str = ""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZE[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a file. Raises CheckpointError for a file that is cut off, has wrong sizes or overlapping tensors, or is no
    safetensors file."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError("a weight file is not a file", where=str(path), fix=AGAIN)
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(len(LFS_POINTER))
            refuse_pointer(first, path)
            length = int.from_bytes(first[:8], "little")
            if len(first) < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    "the safetensors header is longer than the file",
                    where=str(path),
                    got=f"header length {length} in a file of {size} bytes",
                    fix=AGAIN,
                )
            file.seek(8)
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError("a weight file is missing", where=str(path), fix=AGAIN) from None
    except OSError as error:
        raise CheckpointError(
            "a weight file cannot be read", where=str(path), got=os.strerror(error.errno or 0), fix="Make the file readable."
        ) from error
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("the safetensors header is not valid JSON", where=str(path), got=str(error)[:200], fix=AGAIN) from error
    if not isinstance(entries, dict):
        raise CheckpointError("the safetensors header is not a JSON object", where=str(path), got=type(entries).__name__, fix=AGAIN)
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in entries.items() if name != "__metadata__"]
    _check_layout(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def read_small(tensors: Iterable[TensorInfo]) -> dict[str, tuple[int, ...]]:
    """The integers of small tensors of type I64 or I32, by name; of other types and larger ones nothing."""
    chosen = sorted((t for t in tensors if t.dtype in ("I64", "I32") and t.nbytes <= _SMALL), key=lambda t: (t.file, t.offset))
    values: dict[str, tuple[int, ...]] = {}
    for path, group in groupby(chosen, key=lambda t: t.file):
        try:
            with path.open("rb", buffering=_SMALL) as file:
                for tensor in group:
                    file.seek(tensor.offset)
                    data, size = file.read(tensor.nbytes), ITEM_SIZE[tensor.dtype]
                    values[tensor.name] = tuple(
                        int.from_bytes(data[i : i + size], "little", signed=True) for i in range(0, len(data), size)
                    )
        except OSError as error:
            raise CheckpointError("a weight file cannot be read", where=str(path), got=error.strerror, fix="Make it readable.") from error
    return values


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different; json itself would silently keep the last."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _tensor(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    where = f"{path}, tensor {name[:200]}"
    if not name.isprintable() and name.encode("utf-8", "replace").decode() != name:
        raise CheckpointError("the name of a tensor is not text", where=str(path), got=ascii(name[:200]), fix=AGAIN)
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError("a tensor of the safetensors header has no usable dtype, shape and data_offsets", where=where, fix=AGAIN)
    if dtype not in ITEM_SIZE:
        raise CheckpointError(
            "unknown element type", where=where, got=dtype[:100], expected=", ".join(ITEM_SIZE), fix="Save the model in bfloat16."
        )
    begin, end = offsets
    tensor = TensorInfo(name, path, dtype, shape, base + begin)
    if end - begin != tensor.nbytes:
        raise CheckpointError(
            "a tensor's bytes do not match its shape",
            where=where,
            got=f"{end - begin} bytes",
            expected=f"the bytes of {shape} {dtype}",
            fix=AGAIN,
        )
    return tensor


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A JSON list of whole numbers from 0 to 2^62; None for anything else."""
    whole = isinstance(value, list) and len(value) <= _MAX_AXES and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
    return tuple(value) if whole else None


def _check_layout(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    """Raise CheckpointError unless the tensors fill the file behind its header, without holes or overlaps."""

    def damaged(what: str, got: str, expected: str = "") -> CheckpointError:
        return CheckpointError(what, where=str(path), got=got, expected=expected, fix=AGAIN)

    ordered = sorted(tensors, key=lambda t: (t.offset, t.nbytes))
    for before, after in pairwise(ordered):
        if after.offset < before.offset + before.nbytes:
            raise damaged("two tensors overlap", f"{before.name} and {after.name}")
        if after.offset > before.offset + before.nbytes:
            raise damaged("the file has a hole between two tensors", f"after {before.name}")
    end = ordered[-1].offset + ordered[-1].nbytes if ordered else start
    if ordered and ordered[0].offset != start:
        raise damaged("the file has a hole before its first tensor", ordered[0].name)
    if end != size:
        raise damaged("the file is cut off" if size < end else "the file is longer than its tensors", f"{size} bytes", f"{end}")
