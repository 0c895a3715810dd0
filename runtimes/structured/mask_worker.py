"""One thread that makes masks while the device works: a mask costs microseconds, but now and then a millisecond."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

_jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
_started = threading.Lock()


def in_background(job: Callable[[], None]) -> None:
    """Run a job soon. What it raises is dropped: the caller finds the same when it needs the result."""
    if _started.acquire(blocking=False):  # the first caller keeps it
        threading.Thread(target=_work, name="masks", daemon=True).start()
    _jobs.put(job)


def _work() -> None:
    while True:
        job = _jobs.get()
        with suppress(Exception):
            job()
