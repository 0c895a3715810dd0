"""Text files of a checkpoint: those of the demo, with changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo-dense"
NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def copy_text_files(out: Path) -> Path:
    """The demo checkpoint without its weights."""
    out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        shutil.copyfile(DEMO / name, out / name)
    return out


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
