"""Progress of long work on stderr: a bar on a terminal, and a line every few seconds in a pipe or a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from qwen_export.commands.output import is_quiet

LINE_EVERY_S = 5.0
"""Seconds between two lines where stderr is not a terminal. Work that is shorter prints none."""

Report = Callable[[str, int, int], None]
"""What is done now, how much of it is done, and the total; 0 while the total is not known."""


@contextmanager
def progress(unit: str = "bytes") -> Iterator[Report]:
    """Reports for one piece of work. `unit` is "bytes", or the name of what is counted, such as "tokens"."""
    if is_quiet():
        yield lambda text, done, total: None
    elif sys.stderr.isatty():
        with _bar(unit) as bar:
            task = bar.add_task("", total=None)
            yield lambda text, done, total: bar.update(task, description=f"{text:.52}", completed=done, total=total or None)
    else:
        yield line_reports(unit, lambda line: click.echo(line, err=True))


def line_reports(unit: str, write: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> Report:
    """Reports as lines, at most one in LINE_EVERY_S seconds."""
    last = now()

    def report(text: str, done: int, total: int) -> None:
        nonlocal last
        if now() - last >= LINE_EVERY_S:
            last = now()
            write(f"{text}: {_amount(done, total, unit)}" if done or total else f"{text} ...")

    return report


def _amount(done: int, total: int, unit: str) -> str:
    if unit == "bytes":
        return f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB" if total else f"{done / 2**20:.0f} MiB"
    return f"{done} of {total} {unit}".rstrip() if total else f"{done} {unit}".rstrip()


def _bar(unit: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [DownloadColumn(binary_units=True), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
    return Progress(
        TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    )
