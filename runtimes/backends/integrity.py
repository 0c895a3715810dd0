"""Is the bundle whole? Every file is hashed once per machine; later runs only look whether it changed since.

Hashing gigabytes would take longer than loading them. A note in the user's cache directory remembers size, modification time and inode
of each file that passed; a file that was written to since is hashed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qwen_export.manifest import MANIFEST, Manifest, check_hash, check_sizes, file_path

Fingerprint = list[int]


def ensure_whole(bundle: Path, manifest: Manifest, progress: Callable[[str, int], None] | None = None, *, again: bool = False) -> None:
    """Raise BundleError unless every file is what the manifest says. `again` hashes everything whatever the note says; `progress` gets the
    file's name and the bytes just hashed."""
    check_sizes(bundle, manifest)
    note = _note(bundle)
    known = {} if again or note is None else _read(note)
    passed: dict[str, Fingerprint] = {}
    for name, entry in manifest.files.items():
        fingerprint = _fingerprint(file_path(bundle, name))
        if known.get(name) != fingerprint:
            check_hash(bundle, name, entry, partial(progress, name) if progress else None)
        passed[name] = fingerprint
    if note is not None and passed != known:
        with contextlib.suppress(OSError):  # an unwritable home only costs the next run a hash
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps(passed))


def _fingerprint(path: Path) -> Fingerprint:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _note(bundle: Path) -> Path | None:
    """One note per manifest content and place: rewriting the manifest makes everything unknown again. None for a user without a home."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache")
    except RuntimeError:
        return None
    identity = str(bundle.resolve()).encode() + (bundle / MANIFEST).read_bytes()
    return base / "qwen-export" / "whole" / f"{hashlib.sha256(identity).hexdigest()[:32]}.json"


def _read(note: Path) -> dict[str, Fingerprint]:
    try:
        value = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
