"""Folders whose paths are too long for Windows' older limit of 260 characters, which holds wherever longer ones were not enabled."""

from __future__ import annotations

import os
from pathlib import Path

_LIMIT = 200
"""Characters of a folder's path. The others are for the names of a bundle's files."""


def reachable(folder: Path) -> Path:
    """The folder; on Windows, if its path is long, in the form that has no limit."""
    return Path(without_limit(os.path.abspath(folder))) if os.name == "nt" else folder


def without_limit(path: str) -> str:
    r"""A full path of Windows: as it is when it is short or has a prefix already, else as `\\?\C:\FOLDER` or
    `\\?\UNC\SERVER\SHARE\FOLDER`."""
    if len(path) <= _LIMIT or path.startswith(("\\\\?\\", "\\\\.\\")):
        return path
    return "\\\\?\\UNC\\" + path[2:] if path.startswith("\\\\") else "\\\\?\\" + path
