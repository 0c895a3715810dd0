"""The header of a GGUF file, read strictly and without touching the data.

Format: "GGUF", version, counts, then key/value pairs, then name, sizes (innermost first), type and offset of each tensor, then the data, at
multiples of `general.alignment`. The reader of the `gguf` package makes an array per string, which takes 10 s and 0.8 GB for a vocabulary
of the family and 0.2 s here, and it does not name what is damaged. Names and block sizes of the element types are those of the package.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from qwen_export.errors import CheckpointError, UnsupportedError
from qwen_export.extras import needed_for
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo
from qwen_export.graphs.json_file import AGAIN, LFS_POINTER, refuse_pointer

MAGIC = b"GGUF"
FLOATS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
"""Element types without blocks, and their names in safetensors."""

_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES, _MOST_KEYS, _LONGEST_NAME = 4, 1 << 16, 1 << 16
_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """A stored tensor: `kind` is the name of its type, such as "Q4_K", `shape` that of its values. Of types with blocks `info` has rows of
    bytes, else rows of values."""

    kind: str
    shape: tuple[int, ...]
    info: TensorInfo


@dataclass(frozen=True)
class GgufFile:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """Whether a file begins like a GGUF file, or is called one."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC
    except OSError:
        return path.suffix == ".gguf"


def read_gguf(path: Path) -> GgufFile:
    """Metadata and tensors of one file. Raises CheckpointError for a file that is damaged or cut off, UnsupportedError for an older
    version, another byte order, and types that no release of the `gguf` package knows."""
    try:
        with path.open("rb") as file:
            refuse_pointer(file.read(len(LFS_POINTER)), path)
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise _damaged(path, "the file is too short for a GGUF file", f"{size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parsed(path, data)
    except FileNotFoundError:
        raise CheckpointError("a weight file is missing", where=str(path), fix=AGAIN) from None
    except OSError as error:
        raise CheckpointError("a weight file cannot be read", where=str(path), got=error.strerror, fix="Make the file readable.") from error


def _parsed(path: Path, data: mmap.mmap) -> GgufFile:
    if data[:4] != MAGIC:
        raise _damaged(path, "this is not a GGUF file", repr(bytes(data[:4])), repr(MAGIC))
    cursor = _Cursor(path, data)
    version = cursor.number("<I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        raise UnsupportedError(
            "this GGUF file is for machines of the other byte order" if swapped else "this version of GGUF is not supported",
            where=str(path),
            got=f"version {version}",
            expected=" or ".join(map(str, _VERSIONS)),
            fix="Convert the model again with a current llama.cpp.",
        )
    tensors, keys = cursor.number("<Q"), cursor.number("<Q")
    if keys > _MOST_KEYS or tensors > len(data) // 32:
        raise _damaged(path, "the header of the file has impossible counts", f"{keys} keys and {tensors} tensors")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text(_LONGEST_NAME)
        if key in metadata:
            raise _damaged(path, "a key of the metadata occurs twice", key[:200])
        metadata[key] = cursor.value()
    entries = [cursor.tensor() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _damaged(path, "the alignment of the data is not a power of two", str(alignment)[:50])
    return GgufFile(path, metadata, _placed(path, entries, cursor.at + -cursor.at % alignment, len(data)))


class _Cursor:
    """A position in the header. Each method reads what is there and moves on."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 4

    def number(self, form: str) -> Any:
        end = self.at + struct.calcsize(form)
        if end > len(self.data):
            raise _damaged(self.path, "the file ends inside its header", f"{len(self.data)} bytes")
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at = end
        return value

    def text(self, longest: int | None = None) -> str:
        length = self.number("<Q")
        if length > len(self.data) - self.at or (longest is not None and length > longest):
            raise _damaged(self.path, "a text of the header is longer than the file", f"{length} bytes")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _damaged(self.path, "a text of the header is not UTF-8", repr(raw[:50])) from error

    def value(self) -> Any:
        kind = self.number("<I")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(self._form(kind))
        item, count = self.number("<I"), self.number("<Q")
        if count > len(self.data) - self.at:
            raise _damaged(self.path, "an array of the header is longer than the file", f"{count} values")
        if item == _STRING:
            return [self.text() for _ in range(count)]
        form = self._form(item)
        end = self.at + count * struct.calcsize(form)
        if end > len(self.data):
            raise _damaged(self.path, "an array of the header is longer than the file", f"{count} values")
        values = struct.unpack_from(f"<{count}{form[1:]}", self.data, self.at)
        self.at = end
        return list(values)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape with the outermost size first, type, offset in the data."""
        name, axes = self.text(_LONGEST_NAME), self.number("<I")
        if not 0 < axes <= _MOST_AXES:
            raise _damaged(self.path, f"a tensor has an impossible number of axes: {name[:100]}", str(axes))
        sizes = tuple(self.number("<Q") for _ in range(axes))
        return name, sizes[::-1], self.number("<I"), self.number("<Q")

    def _form(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise _damaged(self.path, "a value of the metadata has an unknown type", str(kind))
        return _SCALARS[kind]


def _placed(path: Path, entries: list[tuple[str, tuple[int, ...], int, int]], base: int, size: int) -> dict[str, GgufTensor]:
    """The tensors of the header, each inside the file and none over another."""
    with needed_for("a GGUF file"):
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    found: dict[str, GgufTensor] = {}
    for name, shape, number, offset in entries:
        where = f"{path}, tensor {name[:200]}"
        if name in found:
            raise _damaged(path, "a tensor is stored twice", name[:200])
        if number not in GGMLQuantizationType._value2member_map_:
            raise UnsupportedError(
                "a tensor has an element type that is not known",
                where=where,
                got=f"type {number}",
                fix="Install a newer `gguf`, or give a file quantized to Q8_0 or Q4_0.",
            )
        kind = GGMLQuantizationType(number)
        block, nbytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block or prod(shape) > 1 << 48:
            raise _damaged(path, f"a tensor has a shape that its type cannot have: {name[:100]}", f"{shape} {kind.name}")
        rows = (*shape[:-1], shape[-1] // block * nbytes)
        info = TensorInfo(name, path, FLOATS[kind.name], shape, base + offset) if kind.name in FLOATS else None
        info = info or TensorInfo(name, path, "U8", rows, base + offset)
        if info.offset + info.nbytes > size:
            raise _damaged(path, "the file is cut off", f"{size} bytes", f"at least {info.offset + info.nbytes}")
        found[name] = GgufTensor(kind.name, shape, info)
    for before, after in pairwise(sorted((tensor.info for tensor in found.values()), key=lambda info: info.offset)):
        if after.offset < before.offset + before.nbytes:
            raise _damaged(path, "two tensors overlap", f"{before.name} and {after.name}")
    return found


def _damaged(path: Path, what: str, got: str, expected: str = "") -> CheckpointError:
    return CheckpointError(what, where=str(path), got=got, expected=expected, fix=AGAIN)
