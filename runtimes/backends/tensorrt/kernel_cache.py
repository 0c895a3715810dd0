"""Kernels that TensorRT-RTX compiles on the machine that runs an engine, kept between processes: a second start compiles nothing.

The file belongs to one engine, GPU, driver and library, and is in the user's cache. $QWEN_EXPORT_KERNEL_CACHE names another directory;
empty, nothing is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

VARIABLE = "QWEN_EXPORT_KERNEL_CACHE"


def cache_directory() -> Path | None:
    """Where kernels are kept, None where they are not."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return Path(chosen) if chosen else None
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return None
    return base / "qwen-export" / "kernels"


def write_whole(path: Path, data: bytes) -> None:
    """Another process may do the same: the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


class KernelFile:
    """The kernels of one engine. `engine` is the engine's hash, `machine` what they are compiled for: library, GPU, driver."""

    def __init__(self, engine: str, machine: Sequence[str]) -> None:
        directory = cache_directory()
        name = hashlib.sha256("\n".join((engine, *machine)).encode()).hexdigest()[:32]
        self.path = directory / f"{name}.kernels" if directory is not None else None
        self._size = 0

    def read(self) -> bytes:
        """What an earlier process has left, empty when nothing."""
        try:
            data = self.path.read_bytes() if self.path is not None else b""
        except OSError:
            data = b""
        self._size = len(data)
        return data

    def write(self, data: bytes) -> None:
        """Keep the kernels; nothing happens when there are no more than before, or where the directory cannot be written to."""
        if self.path is None or len(data) <= self._size:
            return
        self._size = len(data)
        with contextlib.suppress(OSError):
            write_whole(self.path, data)
