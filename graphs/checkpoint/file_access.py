"""Positioned reads of large files, from several threads, without filling the page cache.

What the cache holds already comes from there. The rest is read past it (O_DIRECT): on a machine with memory for little else, the pages
that a read of gigabytes needs cost more than the disk does. Systems that lack either way read as usual.
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

_BOUNCE_BYTES = 4 << 20
_PAGE = 4096
# Small reads are cheaper through the cache, with its read-ahead.
_DIRECT_FROM = 256 << 10
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)


class SharedFile:
    """A file open for reading."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._direct: int | None = None
        if _NOWAIT and hasattr(os, "O_DIRECT"):
            try:
                self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError:  # a file system without direct reads
                self._direct = None
        self._local, self._lock = threading.local(), threading.Lock()

    def close(self) -> None:
        os.close(self._file)
        if self._direct is not None:
            os.close(self._direct)

    def read_into(self, view: memoryview, offset: int) -> bool:
        """Fill `view` with the bytes at `offset`; False where the file ends before that."""
        done = self._from_cache(view, offset) if self._direct is not None and view.nbytes >= _DIRECT_FROM else 0
        while done < view.nbytes:
            rest = view[done:]
            if self._direct is not None and rest.nbytes >= _DIRECT_FROM:
                count = self._past_cache(self._direct, rest, offset + done)
            else:
                count = self._read(rest, offset + done)
            if not count:
                return False
            done += count
        return True

    def _from_cache(self, view: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._file, [view], offset, _NOWAIT)
        except OSError:  # nothing of it is cached, or the file system does not support it
            return 0

    def _past_cache(self, direct: int, view: memoryview, offset: int) -> int:
        """One read of whole pages into a page-aligned buffer, and a copy of what was asked for."""
        begin = offset - offset % _PAGE
        bounce = self._bounce()
        wanted = min(_BOUNCE_BYTES, -(-(offset + view.nbytes - begin) // _PAGE) * _PAGE)
        with memoryview(bounce)[:wanted] as target:
            count = os.preadv(direct, [target], begin) - (offset - begin)
            count = max(0, min(count, view.nbytes))
            view[:count] = target[offset - begin : offset - begin + count]
        return count

    def _bounce(self) -> mmap.mmap:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = mmap.mmap(-1, _BOUNCE_BYTES)
        return self._local.buffer

    def _read(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file, [view], offset)
        with self._lock:  # Windows has no positioned reads
            os.lseek(self._file, offset, os.SEEK_SET)
            part = os.read(self._file, min(view.nbytes, _BOUNCE_BYTES))
        view[: len(part)] = part
        return len(part)
