"""A large file written once, front to back, and hashed on the way.

Where the system can, the page cache is left out (O_DIRECT): on a machine that has the memory for little else, filling the cache with
gigabytes that are not read again soon costs several times what the disk costs. Writing and hashing run beside the caller.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from qwen_export.manifest import FileEntry

_STAGE_BYTES = 4 << 20
_STAGES = 4
_PAGE = 4096

Written = Callable[[int, str], None]
"""Called with a size and the SHA-256 of that many bytes, once they are written."""


@dataclass(frozen=True)
class Prefix:
    """The front of a file that was begun before: its size and the hash's state after it."""

    size: int
    digest: Any


class HashedFile:
    """Append with `write`; `entry` is size and SHA-256 once the file is closed. Memory: 16 MB.

    With a `prefix` the file exists and is continued after that many bytes; the rest of it is dropped."""

    def __init__(self, path: Path, prefix: Prefix | None = None) -> None:
        self._path = path
        # Anonymous maps are page-aligned, which direct writes require.
        self._free = deque(mmap.mmap(-1, _STAGE_BYTES) for _ in range(_STAGES))
        self._busy: deque[tuple[mmap.mmap, Future[None], Future[None], int]] = deque()
        self._marks: deque[tuple[int, Future[str], Written]] = deque()
        self._stage, self._filled, self._hashed = self._free.popleft(), 0, 0
        self._digest = hashlib.sha256()
        self.size = 0
        if prefix is not None:
            self._take_over(prefix)
        self._file = _open(path, prefix is not None)
        os.lseek(self._file, self.size - self._filled, os.SEEK_SET)
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

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
        source = np.frombuffer(data, np.uint8)
        while done < data.nbytes:
            count = min(data.nbytes - done, _STAGE_BYTES - self._filled)
            # numpy copies without holding the interpreter, unlike the map itself.
            np.copyto(np.frombuffer(self._stage, np.uint8, count, self._filled), source[done : done + count])
            self._filled += count
            done += count
            if self._filled == _STAGE_BYTES:
                self._send(_STAGE_BYTES)

    def mark(self, call: Written) -> None:
        """Call back once all bytes up to here are written."""
        self._hash()
        self._marks.append((self.size, self._hasher.submit(lambda: self._digest.copy().hexdigest()), call))

    def _take_over(self, prefix: Prefix) -> None:
        """Continue after the prefix: direct writes begin at a page, so the last part of a page is written again."""
        os.truncate(self._path, prefix.size)
        self._digest, self.size = prefix.digest, prefix.size
        self._filled = self._hashed = prefix.size % _PAGE
        with self._path.open("rb") as file:
            file.seek(prefix.size - self._filled)
            self._stage[: self._filled] = file.read(self._filled)

    def _hash(self) -> Future[None]:
        """Hash what the stage holds and has not been hashed."""
        part = memoryview(self._stage)[self._hashed : self._filled]
        self._hashed = self._filled
        return self._hasher.submit(self._digest.update, part)

    def _send(self, count: int) -> None:
        """Hand the stage to the two threads, and take another."""
        hashed = self._hash()
        written = self._writer.submit(write_all, lambda part: os.write(self._file, part), memoryview(self._stage)[:count])
        self._busy.append((self._stage, written, hashed, self.size))
        if not self._free:
            self._reclaim()
        self._stage, self._filled, self._hashed = self._free.popleft(), 0, 0

    def _reclaim(self) -> None:
        stage, written, hashed, end = self._busy.popleft()
        written.result()
        hashed.result()
        self._free.append(stage)
        while self._marks and self._marks[0][0] <= end:
            size, digest, call = self._marks.popleft()
            call(size, digest.result())

    def _finish(self) -> None:
        """Direct writes come in whole pages: pad the last one, and cut the file where its contents end."""
        if self._filled:
            self._send(-(-self._filled // _PAGE) * _PAGE)
        while self._busy:
            self._reclaim()
        os.truncate(self._path, self.size)


def _open(path: Path, exists: bool) -> int:
    flags = os.O_WRONLY | (0 if exists else os.O_CREAT | os.O_EXCL) | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
    except OSError:
        if not exists:
            path.unlink(missing_ok=True)
        return os.open(path, flags, 0o644)  # a file system without direct writes


def write_all(write: Callable[[memoryview], int], data: memoryview) -> None:
    done = 0
    while done < data.nbytes:
        done += write(data[done:])
