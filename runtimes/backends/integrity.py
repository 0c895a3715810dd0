"""Is the bundle whole? Every file is hashed once per machine; later runs only look whether it changed since.

Hashing gigabytes would take longer than loading them. A note in the user's cache directory has size, modification time and inode of each
file that passed; a file that was written to since is hashed again. The process remembers it, too: where the note cannot be written, a
command that checks a bundle and then loads it reads the files once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qwen_export.long_paths import reachable
from qwen_export.manifest import MANIFEST, Manifest, check_hash, check_sizes, file_path

Fingerprint = list[int]
_passed: dict[str, dict[str, Fingerprint]] = {}


def ensure_whole(bundle: Path, manifest: Manifest, progress: Callable[[str, int], None] | None = None, *, again: bool = False) -> None:
    """Raise BundleError unless every file is as the manifest describes it. `again` hashes everything, note or not; `progress` gets the
    file's name and the bytes just hashed."""
    check_sizes(bundle, manifest)
    identity = _identity(bundle)
    note = _note(identity)
    known = {} if again else _passed.get(identity) or ({} if note is None else _read(note))
    passed: dict[str, Fingerprint] = {}
    for name, entry in manifest.files.items():
        fingerprint = _fingerprint(file_path(bundle, name))
        if known.get(name) != fingerprint:
            check_hash(bundle, name, entry, partial(progress, name) if progress else None)
        passed[name] = fingerprint
    _passed[identity] = passed
    if note is not None and passed != known:
        with contextlib.suppress(OSError):  # where the note cannot be written, the next process hashes again
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps(passed))


def forget() -> None:
    """Forget what this process has hashed; the note on disk stays."""
    _passed.clear()


def _fingerprint(path: Path) -> Fingerprint:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _identity(bundle: Path) -> str:
    """Of a manifest's contents and place: a changed manifest makes everything unknown again."""
    bundle = reachable(bundle)
    return hashlib.sha256(str(bundle.resolve()).encode() + (bundle / MANIFEST).read_bytes()).hexdigest()[:32]


def _note(identity: str) -> Path | None:
    """None for a user without a home directory."""
    from platformdirs import user_cache_path

    try:
        path = user_cache_path("qwen-export", appauthor=False) / "whole" / f"{identity}.json"
    except RuntimeError:
        return None
    return path if path.is_absolute() else None


def _read(note: Path) -> dict[str, Fingerprint]:
    try:
        value = json.loads(note.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
