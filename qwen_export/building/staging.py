"""A directory that appears whole or not at all.

It is filled in `.NAME.partial/bundle` beside its destination and renamed at the end. A failure removes it. What an interrupted or killed
build had finished stays there, and the next build to the same destination goes on with it. It is no bundle, since its manifest is written
last.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from qwen_export.errors import BuildError, Interrupted
from qwen_export.manifest import MANIFEST

JOURNAL = "journal"
"""Beside the staged directory: notes of what is finished, in files whose names begin so. Without them nothing is kept."""


def journal_path(staging: Path, number: int) -> Path:
    """The notes on the file of weights `number`, beside the staged directory. The first is there as long as anything is kept."""
    return staging.parent / (f"{JOURNAL}.{number}" if number else JOURNAL)


def unfinished(destination: Path) -> Path | None:
    """The directory of an interrupted build to `destination` that has finished work, None where there is none."""
    work = _work_path(destination.absolute())
    return work if any(journal.stat().st_size for journal in work.glob(f"{JOURNAL}*")) else None


def _work_path(destination: Path) -> Path:
    return destination.parent / f".{destination.name}.partial"


_CONTENTS, _LOCK = "bundle", "lock"


@contextlib.contextmanager
def staged_directory(destination: Path, *, replace: bool = False, keep: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a directory beside `destination`; rename it there when the block ends well. When it does not, remove it, unless the reason is
    an interrupt and there is a JOURNAL in its parent. Of an interrupted run before it may hold the files called `keep`, nothing else.

    An existing bundle is only replaced with `replace`, and only once the new one is complete. Raises BuildError for a destination that may
    not be replaced, a full disk, or any other failure of the file system."""
    destination = destination.absolute()
    _check_replaceable(destination, replace)
    try:
        with _work_directory(destination) as work:
            staging = work / _CONTENTS
            staging.mkdir(exist_ok=True)
            staging.chmod(0o755)
            for left in staging.iterdir():
                if left.name not in keep:
                    left.unlink()
            yield staging
            _check_replaceable(destination, replace)  # another process may have been faster
            _swap(staging, destination)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(
                "the disk is full; no bundle was written", where=str(destination), fix="Free space, or give an {output} on another disk."
            ) from error
        raise BuildError(
            "no bundle was written",
            where=str(error.filename or destination),
            got=error.strerror or error,
            fix="Check the path and its permissions.",
        ) from error


@contextlib.contextmanager
def _work_directory(destination: Path) -> Iterator[Path]:
    """`.NAME.partial`, or a directory of another name while another build is at work there."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    work = _work_path(destination)
    with contextlib.ExitStack() as stack:
        lock = _lock(work)
        if lock is None:
            yield stack.enter_context(_temporary(destination, "building"))
            return
        stack.callback(os.close, lock)
        try:
            yield work
        except KeyboardInterrupt as interrupt:
            if unfinished(destination) is None:
                shutil.rmtree(work, ignore_errors=True)
                raise
            kept = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
            raise Interrupted(
                f"{kept / 2**20:.1f} MiB of finished weights are kept in {work}. The same command goes on from there; to give the space "
                f"back, remove that directory."
            ) from interrupt
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def _lock(work: Path) -> int | None:
    """Make the directory and lock it for this process; None where another has it, or where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    work.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(work / _LOCK, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _check_replaceable(destination: Path, replace: bool) -> None:
    if not os.path.lexists(destination):
        return
    if not replace:
        raise BuildError(
            "the output directory exists already", where=str(destination), fix="Give another {output}, or {force} to replace the bundle."
        )
    if not destination.is_dir() or (not (destination / MANIFEST).exists() and any(destination.iterdir())):
        raise BuildError("the output path holds something that is not a bundle", where=str(destination), fix="Give another {output}.")


@contextlib.contextmanager
def _temporary(destination: Path, purpose: str) -> Iterator[Path]:
    """A hidden directory on the same file system, removed at the end with what is left in it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".{destination.name}.{purpose}-", dir=destination.parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _swap(staging: Path, destination: Path) -> None:
    if not destination.exists():
        os.rename(staging, destination)
        return
    with _temporary(destination, "old") as old:
        try:
            os.rename(destination, old / "bundle")
            os.rename(staging, destination)
        except BaseException:
            if not os.path.lexists(destination):
                os.rename(old / "bundle", destination)
            raise


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Interrupts wait until the block is over: native libraries interrupted while they load end the process without a message."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {number: signal.signal(number, lambda n, frame: arrived.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for first in arrived[:1]:
        signal.raise_signal(first)
