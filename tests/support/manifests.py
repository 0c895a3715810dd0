"""Changing the manifest of a bundle, as its maker could: with a digest that fits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_export.manifest import DIGEST, MANIFEST


def write_raw(bundle: Path, data: str | bytes) -> None:
    """Write manifest.json and its digest."""
    content = data.encode() if isinstance(data, str) else data
    (bundle / MANIFEST).write_bytes(content)
    (bundle / DIGEST).write_text(f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n")


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the parsed manifest in place."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    edit(manifest)
    write_raw(bundle, json.dumps(manifest))
