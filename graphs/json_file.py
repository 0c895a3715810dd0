"""Reading a JSON object from a file of a checkpoint, in bounded memory and with one message for each kind of damage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qwen_export.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs"
"""What the file begins with that git leaves where git-lfs did not fetch the contents."""

_LARGEST = 256 << 20
AGAIN = "Copy or download it again."


def read_json_object(path: Path, what: str, kind: type[CheckpointError] = CheckpointError, largest: int = _LARGEST) -> dict[str, Any]:
    """The JSON object in `path`. `what` names the file in messages, such as "weight index"; `largest` is in bytes.

    Raises `kind` for a file that cannot be read, is too large, a git-lfs pointer, not JSON, or not an object."""
    try:
        if not path.is_file():
            raise kind(f"the {what} is not a file", where=str(path), fix=AGAIN)
        with path.open("rb") as file:
            # A read of `largest` bytes would allocate them for a file of any size.
            content = file.read(min(os.fstat(file.fileno()).st_size, largest) + 1)
    except OSError as error:
        raise kind(f"the {what} cannot be read", where=str(path), got=error.strerror, fix="Make the file readable.") from error
    if len(content) > largest:
        raise kind(f"the {what} is too large", where=str(path), expected=f"at most {largest} bytes", fix=AGAIN)
    refuse_pointer(content, path, kind)
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise kind(f"the {what} is not valid JSON", where=str(path), got=str(error)[:200], fix=AGAIN) from error
    if not isinstance(value, dict):
        raise kind(f"the {what} is not a JSON object", where=str(path), got=_kind(value), fix=AGAIN)
    return value


def refuse_pointer(start: bytes, path: Path, kind: type[CheckpointError] = CheckpointError) -> None:
    """Raise `kind` where a file begins as a git-lfs pointer does."""
    if start.startswith(LFS_POINTER):
        raise kind(
            "the file is a git-lfs pointer, not its contents",
            where=str(path),
            fix="Run `git lfs install` and `git lfs pull` in the checkpoint directory, or download the files.",
        )


def _kind(value: object) -> str:
    """What a JSON value is that is no object."""
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
