"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qwen_export.errors import BuildError
from qwen_export.manifest import MANIFEST


@contextlib.contextmanager
def staged_directory(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `destination`; rename it there when the block ends well, remove it when it does not.

    An existing bundle is only replaced with `replace`, and only once the new one is complete. Raises BuildError for a destination that may
    not be replaced, a full disk, or any other failure of the file system."""
    destination = destination.absolute()
    _check_replaceable(destination, replace)
    try:
        with _temporary(destination, "building") as staging:
            staging.chmod(0o755)
            yield staging
            _check_replaceable(destination, replace)  # somebody else may have been faster
            _swap(staging, destination)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(
                "the disk is full; no bundle was written", where=str(destination), fix="Free space, or give an -o on another disk."
            ) from error
        raise BuildError("no bundle was written", where=str(error.filename or destination), got=error.strerror or error) from error


def _check_replaceable(destination: Path, replace: bool) -> None:
    if not os.path.lexists(destination):
        return
    if not replace:
        raise BuildError(
            "the output directory exists already", where=str(destination), fix="Give another -o, or --force to replace the bundle."
        )
    if not destination.is_dir() or (not (destination / MANIFEST).exists() and any(destination.iterdir())):
        raise BuildError("the output path holds something that is not a bundle", where=str(destination), fix="Give another -o.")


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
