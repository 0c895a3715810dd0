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

    An existing bundle is only replaced with `replace`, and only once the new one is complete."""
    if destination.exists():
        if not replace:
            raise BuildError("the output directory exists already", where=str(destination), fix="Give another -o, or --force to replace the bundle.")
        if not (destination / MANIFEST).exists() and any(destination.iterdir()):
            raise BuildError("the output directory holds something that is not a bundle", where=str(destination), fix="Give another -o.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.building-", dir=destination.parent))
    try:
        staging.chmod(0o755)
        yield staging
        _swap(staging, destination)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(
                "the disk is full; no bundle was written", where=str(destination), fix="Free space, or give an -o on another disk."
            ) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(staging: Path, destination: Path) -> None:
    if not destination.exists():
        os.rename(staging, destination)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old-", dir=destination.parent))
    os.rename(destination, old / "bundle")
    os.rename(staging, destination)
    shutil.rmtree(old, ignore_errors=True)
