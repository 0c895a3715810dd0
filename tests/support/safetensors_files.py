"""Writing safetensors files by hand, as damaged as a test wants them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_file(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    """The reverse; `length` writes another header length than the true one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    header, data = split_file(path)
    edit(header)
    join_file(path, header, data)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def overwrite_tensor(directory: Path, name: str, data: bytes, at: int = 0) -> None:
    """Replace bytes of a stored tensor, `at` bytes from its start."""
    for path in directory.glob("*.safetensors"):
        header, content = split_file(path)
        if name in header:
            begin = header[name]["data_offsets"][0] + at
            join_file(path, header, content[:begin] + data + content[begin + len(data) :])
            return
    raise KeyError(name)


def remove_tensor(directory: Path, name: str) -> None:
    """Take a tensor out of its shard and the index, leaving a sound file."""
    for path in directory.glob("*.safetensors"):
        header, content = split_file(path)
        if name in header:
            begin, end = header.pop(name)["data_offsets"]
            for key, entry in header.items():
                if key != "__metadata__" and entry["data_offsets"][0] >= end:
                    entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]
            join_file(path, header, content[:begin] + content[end:])
    edit_json(directory / "model.safetensors.index.json", lambda index: index["weight_map"].pop(name))


def add_tensor(directory: Path, name: str, dtype: str, shape: list[int], data: bytes) -> None:
    """Append a tensor to the first shard and the index."""
    path = sorted(directory.glob("*.safetensors"))[0]
    header, content = split_file(path)
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(content), len(content) + len(data)]}
    join_file(path, header, content + data)
    edit_json(directory / "model.safetensors.index.json", lambda index: index["weight_map"].__setitem__(name, path.name))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))
