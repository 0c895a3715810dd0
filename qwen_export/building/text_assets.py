"""The text half of a bundle: tokenizer, chat template, generation settings, copied from the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from qwen_export.errors import CheckpointError
from qwen_export.manifest import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG


def check_text_assets(checkpoint: Path) -> None:
    """Raise CheckpointError, before any work, for what `copy_text_assets` and `stop_ids` could not use."""
    stop_ids(checkpoint, ())
    _read_json(checkpoint / TOKENIZER_CONFIG)
    if not (checkpoint / TOKENIZER).exists() and (checkpoint / "vocab.json").exists():
        raise CheckpointError(
            "the checkpoint has no tokenizer.json",
            where=str(checkpoint),
            fix="Save it once with transformers: AutoTokenizer(...).save_pretrained.",
        )


def copy_text_assets(checkpoint: Path, bundle: Path) -> list[str]:
    """Copy what is there; returns the names written. A chat template inside tokenizer_config.json becomes a file of its own."""
    written = []
    for name in (TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE):
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, bundle / name)
            written.append(name)
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
    if not all(type(i) is int and i >= 0 for i in more):
        raise CheckpointError(
            "eos_token_id is not a token id or a list of them", where=str(checkpoint / GENERATION_CONFIG), got=repr(given)
        )
    return tuple(sorted({*config_ids, *more}))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError("a file of the checkpoint is not valid JSON", where=str(path), got=error) from error
    if not isinstance(value, dict):
        raise CheckpointError("a file of the checkpoint is not a JSON object", where=str(path), got=type(value).__name__)
    return value
