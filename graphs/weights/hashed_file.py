"""A large file written once, front to back, and hashed on the way.

Where the system can, the page cache is left out (O_DIRECT): on a machine that has the memory for little else, filling the cache with
gigabytes that nobody reads back soon costs several times what the disk costs. Writing and hashing run beside the caller.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from qwen_export.manifest import FileEntry

_STAGE_BYTES = 4 << 20
_STAGES = 4
_PAGE = 4096


class HashedFile:
    """Append with `write`; `entry` is size and SHA-256 once the file is closed. Memory: 16 MB."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open(path)
        # Anonymous maps are page-aligned, as direct writes want their memory.
        self._free = deque(mmap.mmap(-1, _STAGE_BYTES) for _ in range(_STAGES))
        self._busy: deque[tuple[mmap.mmap, Future[None], Future[None]]] = deque()
        self._stage, self._filled = self._free.popleft(), 0
        self._digest = hashlib.sha256()
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._writer.shutdown(cancel_futures=True)
            self._hasher.shutdown(cancel_futures=True)
            os.close(self._file)
        if error is None:
            self.entry = FileEntry(self.size, self._digest.hexdigest())

    def write(self, data: memoryview) -> None:
        """Append bytes. May raise the OSError of an earlier write."""
        self.size += data.nbytes
        done = 0
        while done < data.nbytes:
            count = min(data.nbytes - done, _STAGE_BYTES - self._filled)
            self._stage[self._filled : self._filled + count] = data[done : done + count]
            self._filled += count
            done += count
            if self._filled == _STAGE_BYTES:
                self._send(_STAGE_BYTES)

    def _send(self, count: int) -> None:
        """Hand the stage to the two threads, and take another."""
        stage, hashed = self._stage, self._filled
        written = self._writer.submit(_write_all, lambda part: os.write(self._file, part), memoryview(stage)[:count])
        self._busy.append((stage, written, self._hasher.submit(self._digest.update, memoryview(stage)[:hashed])))
        if not self._free:
            self._reclaim()
        self._stage, self._filled = self._free.popleft(), 0

    def _reclaim(self) -> None:
        stage, written, hashed = self._busy.popleft()
        written.result()
        hashed.result()
        self._free.append(stage)

    def _finish(self) -> None:
        """Direct writes come in whole pages: pad the last one, and cut the file where its contents end."""
        if self._filled:
            self._send(-(-self._filled // _PAGE) * _PAGE)
        while self._busy:
            self._reclaim()
        os.truncate(self._path, self.size)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
    except OSError:
        path.unlink(missing_ok=True)
        return os.open(path, flags, 0o644)  # a file system without direct writes


def _write_all(write: Callable[[memoryview], int], data: memoryview) -> None:
    done = 0
    while done < data.nbytes:
        done += write(data[done:])
