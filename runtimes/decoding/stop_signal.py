"""A wish of one thread that work of another ends early."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StopSignal:
    """Whoever works looks at `given` between two parts, and says with `ends` what interrupts the part that is being done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._end: Callable[[], None] | None = None
        self.given = False

    def give(self) -> None:
        """From any thread, once or more."""
        with self._lock:
            self.given = True
            if self._end is not None:
                self._end()

    @contextmanager
    def ends(self, end: Callable[[], None]) -> Iterator[None]:
        """`end` is called in here when the signal is given, or at once where it was."""
        with self._lock:
            self._end = end
            if self.given:
                end()
        try:
            yield
        finally:
            with self._lock:
                self._end = None
