"""The first look at a bundle hashes it: that takes a while for a large one, and its progress is shown."""

from __future__ import annotations

from pathlib import Path

from qwen_export.commands.progress import progress
from qwen_export.extras import needed_for
from qwen_export.manifest import Manifest, load_manifest


def hash_with_progress(bundle: Path, *, again: bool = False) -> Manifest:
    """Raise BundleError unless the bundle is whole; returns its manifest. `again`: hash what an earlier run has hashed, too."""
    with needed_for("a check of a bundle"):
        from qwen_export.runtimes.backends.integrity import ensure_whole
    manifest = load_manifest(bundle)
    total, done = sum(entry.size for entry in manifest.files.values()), 0
    with progress() as report:

        def hashed(name: str, count: int) -> None:
            nonlocal done
            done += count
            report(f"hashing {name}", done, total)

        ensure_whole(bundle, manifest, hashed, again=again)
    return manifest
