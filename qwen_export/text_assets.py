"""The text half of a bundle: tokenizer, chat template, generation settings, copied from the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from qwen_export.errors import CheckpointError
from qwen_export.manifest import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG


def copy_text_assets(checkpoint: Path, bundle: Path) -> list[str]:
    """Copy what is there; returns the names written. A chat template inside tokenizer_config.json becomes a file of its own."""
    written = []
    for name in (TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE):
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, bundle / name)
            written.append(name)
    if TOKENIZER not in written and (checkpoint / "vocab.json").exists():
        raise CheckpointError(
            "the checkpoint has no tokenizer.json", where=str(checkpoint), fix="Save it once with transformers: AutoTokenizer(...).save_pretrained."
        )
    if CHAT_TEMPLATE not in written:
        template = _read_json(checkpoint / TOKENIZER_CONFIG).get("chat_template")
        if isinstance(template, str):
            (bundle / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
            written.append(CHAT_TEMPLATE)
    return written


def stop_ids(checkpoint: Path, config_ids: tuple[int, ...]) -> tuple[int, ...]:
    """End-of-sequence ids of config.json and generation_config.json together: either alone is wrong for some releases."""
    given = _read_json(checkpoint / GENERATION_CONFIG).get("eos_token_id")
    more = given if isinstance(given, list) else [given] if given is not None else []
    return tuple(sorted({*config_ids, *(int(i) for i in more)}))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError("a file of the checkpoint is not valid JSON", where=str(path), got=str(error)) from error
    return value if isinstance(value, dict) else {}
