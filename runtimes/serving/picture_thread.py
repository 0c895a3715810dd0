"""Pictures of running requests, encoded in a thread beside the engine's: other requests go on, and so does the text before a picture.

The thread has a lower priority than the engine's. Where both want the processor, most of it is for tokens that someone waits for; where the
engine has nothing to do until a picture is there, the tower has all of it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from qwen_export.runtimes.decoding.prompt_pictures import Features
from qwen_export.runtimes.decoding.stop_signal import StopSignal
from qwen_export.runtimes.serving.scheduler import Scheduler
from qwen_export.runtimes.serving.served_call import ServedCall

_NICE = 5
"""Of the thread on Linux: a thread of the engine on the same core gets three times as much of it."""

_PATIENCE_S = 0.02
"""Until the engine looks at requests again while it waits for pictures alone."""


@dataclass(eq=False)
class _Job:
    """Picture or video number `index` of a call, whose first token that is not text is at `start`."""

    call: ServedCall
    index: int
    start: int
    stop: StopSignal = field(default_factory=StopSignal)


class PictureThread:
    """`enter`, `release` and `leave` are for the engine's thread. Features that were made are kept by the call."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._done: deque[tuple[_Job, Exception | None]] = deque()
        self._closed = False
        self._left: dict[int, list[_Job]] = {}
        """By the key of a call, in the order of its text. The engine's thread alone uses it."""
        self._thread: threading.Thread | None = None

    def enter(self, call: ServedCall, read: int, scheduler: Scheduler) -> None:
        """A call has a slot that holds the first `read` tokens of its text: encode what is behind them. Until its first picture is there,
        it is read up to that alone."""
        seen = call.request.pictures.seen if call.request.pictures is not None else ()
        jobs = [_Job(call, i, int(one.places[0])) for i, one in enumerate(seen) if one.places[-1] >= read and i not in call.encoded]
        if not jobs:
            return
        self._left[call.key] = jobs
        scheduler.bind(call.key, jobs[0].start)
        with self._changed:
            self._jobs += jobs
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="pictures", daemon=True)
            self._thread.start()

    def leave(self, call: ServedCall) -> None:
        """A call has lost its slot, or has ended: what is being done for it stops."""
        jobs = self._left.pop(call.key, [])
        with self._changed:
            self._jobs = deque(job for job in self._jobs if job.call is not call)
        for job in jobs:
            job.stop.give()

    def release(self, scheduler: Scheduler) -> list[tuple[ServedCall, Exception]]:
        """Let calls go on whose pictures are encoded; returns those whose picture could not be. While no call has anything else to do,
        this waits."""
        idle = bool(self._left) and not scheduler.rows and not scheduler.texts
        with self._changed:
            if not self._done and idle:
                self._changed.wait(_PATIENCE_S)
            done, self._done = self._done, deque()
        failed = []
        for job, error in done:
            left = self._left.get(job.call.key, [])
            if job not in left:  # it was stopped meanwhile
                continue
            if error is not None:
                failed.append((job.call, error))
            else:
                left.remove(job)
                scheduler.bind(job.call.key, left[0].start if left else None)
        return failed

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for jobs in self._left.values():
            for job in jobs:
                job.stop.give()
        if self._thread is not None:
            self._thread.join()

    def _main(self) -> None:
        yield_processor()
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._jobs.popleft()
            error: Exception | None = None
            try:
                job.call.encoded[job.index] = self._encoded(job)
            except Exception as raised:
                error = raised
            with self._changed:
                self._done.append((job, error))
                self._changed.notify_all()

    @staticmethod
    def _encoded(job: _Job) -> Features:
        assert job.call.request.pictures is not None
        return job.call.request.pictures.seen[job.index].features(job.stop)


def yield_processor() -> None:
    """Give the calling thread, and those that it will start, a lower priority, where threads have one of their own."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
