"""Run a command in a fresh process and measure it."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """Wall time in seconds, peak resident memory in MB (2^20 bytes; file pages that are mapped count), and what was printed to stdout."""

    wall_s: float
    peak_rss_mb: float
    stdout: str


def run_measured(command: Sequence[object], *, cpus: int | None = None) -> Measured:
    """Run `command`, whose parts are turned into strings, on the first `cpus` allowed CPUs if given.

    A non-zero exit raises RuntimeError with the end of its stderr.
    """
    arguments = [str(part) for part in command]
    allowed = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=stdout, stderr=stderr)
        if cpus is not None:
            os.sched_setaffinity(process.pid, allowed[:cpus])
        _, status, usage = os.wait4(process.pid, 0)  # this child's peak, not the largest of all children so far
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(arguments)} exited with {process.returncode}:\n{stderr.read()[-4000:]}")
        return Measured(wall, usage.ru_maxrss / 1024, stdout.read())


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM line")
