"""Cases that run in another process, so that a crash or a hang ends only that process, and how many there are.

A worker reads a case a line, and writes a JSON line for each with "case" and "outcome".
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

PER_PROCESS = 150
"""Cases of one process: libraries that it compares with keep some memory of each."""

LIMIT_S = 60
"""Far more than a case needs: it is for cases that never end."""


def seeds(few: int, many: int) -> list[Any]:
    """For `parametrize`: the seeds of every run, and, as slow tests, those up to `many`, or to QWEN_EXPORT_FUZZ where that is set."""
    return [range(few), pytest.param(range(few, int(os.environ.get("QWEN_EXPORT_FUZZ", many))), marks=pytest.mark.slow)]


def outcomes(module: str, subject: Path, cases: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run the cases with `python -m module subject`. A process that ends or hangs is the outcome of its case; another one runs the rest."""
    for start in range(0, len(cases), PER_PROCESS):
        yield from _outcomes(module, subject, list(cases[start : start + PER_PROCESS]))


def _outcomes(module: str, subject: Path, waiting: list[str]) -> Iterator[dict[str, Any]]:
    while waiting:
        command = [sys.executable, "-m", module, str(subject)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as worker:
            lines: queue.Queue[str] = queue.Queue()
            errors: list[str] = []
            assert worker.stdin and worker.stdout and worker.stderr
            threads = [
                threading.Thread(target=_forward, args=(worker.stdout, lines), daemon=True),
                threading.Thread(target=_feed, args=(worker.stdin, list(waiting)), daemon=True),
                threading.Thread(target=errors.extend, args=(worker.stderr,), daemon=True),
            ]
            for thread in threads:
                thread.start()
            while waiting:
                try:
                    line = lines.get(timeout=LIMIT_S)
                except queue.Empty:
                    worker.kill()
                    yield {"case": waiting.pop(0), "outcome": "failure: it does not end"}
                    break
                if not line:
                    code = worker.wait()
                    threads[2].join(5)
                    yield {"case": waiting.pop(0), "outcome": f"failure: the process ended with {code}: {''.join(errors[-3:])}"}
                    break
                waiting.pop(0)
                yield json.loads(line)


def _forward(source: Any, lines: queue.Queue[str]) -> None:
    for line in source:
        lines.put(line)
    lines.put("")


def _feed(target: Any, cases: Sequence[str]) -> None:
    with contextlib.suppress(OSError):  # the process may end before it has read all
        target.write("".join(f"{case}\n" for case in cases))
        target.close()
