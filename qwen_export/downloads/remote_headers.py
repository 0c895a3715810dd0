"""The header of a safetensors file that stays on a server, as a file of its size that is empty behind the header."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.safetensors_header import read_header
from qwen_export.graphs.json_file import AGAIN

Ranges = Callable[[int, int], tuple[bytes, int]]
"""Bytes start..stop-1 of the file, and its size."""

_FIRST, _LONGEST = 256 << 10, 100 << 20
# `open_checkpoint` compares these where config.json ties them. Other heads differ in their first bytes.
_COMPARED, _COMPARED_BYTES = ("lm_head.weight", "embed_tokens.weight"), 64 << 10


def write_header(path: Path, ranges: Ranges) -> None:
    """Write the file. Systems without sparse files need its whole size on the disk."""
    first, size = ranges(0, _FIRST)
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > min(_LONGEST, max(size, len(first)) - 8):
        raise CheckpointError("the safetensors header is longer than the file", where=path.name, got=f"{length} bytes", fix=AGAIN)
    if length + 8 > len(first):
        first += ranges(len(first), length + 8)[0]
    with path.open("wb") as file:
        file.write(first)
        file.truncate(max(size, len(first)))
    for name, info in read_header(path).items():
        if name.endswith(_COMPARED) and info.nbytes:
            part, _ = ranges(info.offset, info.offset + min(_COMPARED_BYTES, info.nbytes))
            with path.open("r+b") as file:
                file.seek(info.offset)
                file.write(part)
