"""Which files a GGUF model is in: one, or the parts of `NAME-00001-of-00003.gguf`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.llama_cpp.gguf_header import GgufTensor, is_gguf, read_gguf
from qwen_export.graphs.json_file import AGAIN

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_COUNT, _TENSORS = "split.count", "split.tensors.count"
# Files of the vision tower and of importance matrices, which repositories keep beside the model.
_BESIDE = ("mmproj", "imatrix")


def gguf_files(path: Path) -> list[Path]:
    """The files of the model at `path`, in order; none where it is no GGUF model.

    `path` is one of the files, or a directory that holds one model and no safetensors. Raises CheckpointError for a directory with several
    models, and for parts that are missing."""
    if path.is_dir():
        if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
            return []
        models = _models(file for file in path.glob("*.gguf") if not any(word in file.name.lower() for word in _BESIDE))
        if len(models) > 1:
            raise CheckpointError(
                "the directory holds several GGUF models",
                where=str(path),
                got=", ".join(sorted(models)[:8]),
                fix="Give the path of one of them: its file, or any of its parts.",
            )
        return next(iter(models.values()), [])
    if not is_gguf(path):
        return []
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    names = [f"{part['stem']}-{number:05d}-of-{part['count']}.gguf" for number in range(1, int(part["count"]) + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError("a part of the GGUF model is missing", where=str(path.parent), got=f"without {missing[0]}", fix=AGAIN)
    return [path.parent / name for name in names]


def _models(files: Iterable[Path]) -> dict[str, list[Path]]:
    """The models of a directory by their names."""
    found: dict[str, list[Path]] = {}
    for file in sorted(files):
        part = _PART.fullmatch(file.name)
        found.setdefault(part["stem"] if part else file.name, gguf_files(file))
    return found


def read_parts(files: list[Path]) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata and tensors of all parts. Raises CheckpointError where they do not belong together."""
    parts = [read_gguf(file) for file in files]
    metadata = parts[0].metadata
    count = metadata.get(_COUNT, 1)
    if count not in (0, 1) and count != len(parts):
        raise CheckpointError(
            "a part of the GGUF model is missing",
            where=str(files[0]),
            got=f"{len(parts)} of {count} parts",
            fix="Keep all parts in one directory, under the names NAME-00001-of-00003.gguf that they were written with.",
        )
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice is not None:
            raise CheckpointError("a tensor is stored twice", where=twice, got=part.path.name, fix="Keep the parts of one model together.")
        tensors |= part.tensors
    wanted = metadata.get(_TENSORS, len(tensors))
    if wanted != len(tensors):
        raise CheckpointError(
            "the parts of the GGUF model do not belong together",
            where=str(files[0]),
            got=f"{len(tensors)} tensors",
            expected=str(wanted)[:50],
            fix=AGAIN,
        )
    return metadata, tensors
