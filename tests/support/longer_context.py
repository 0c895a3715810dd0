"""A checkpoint whose model takes another length of text, and that model on a GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qwen_export import build
from qwen_export.runtimes import Model, load


def with_context(checkpoint: Path, tokens: int, copy: Path) -> Path:
    """A copy of a checkpoint with so many positions; the rotation of a position does not depend on their number."""
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    config["max_position_embeddings"] = tokens
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def on_gpu(checkpoint: Path, tokens: int, folder: Path) -> Model:
    """The checkpoint built and loaded for so many tokens, with two drafts a round."""
    longer = with_context(checkpoint, tokens, folder / "checkpoint")
    return load(build(longer, folder / "bundle", device="cuda", precision="fp16"), max_context=tokens, speculate=2)
