"""A checkpoint whose model takes another length of text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def with_context(checkpoint: Path, tokens: int, copy: Path) -> Path:
    """A copy of a checkpoint with so many positions; the rotation of a position does not depend on their number."""
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    config["max_position_embeddings"] = tokens
    (copy / "config.json").write_text(json.dumps(config))
    return copy
