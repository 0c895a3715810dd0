"""Do tokenizer and chat template of a bundle work? Asked by `build` before work, by `verify` and `check`, so that `run` finds no fault
that they let pass."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qwen_export.errors import BundleError
from qwen_export.manifest import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG

_QUESTION = "Is this a test?"


def check_text(directory: Path, names: Collection[str]) -> str:
    """Load the tokenizer, render the template for a question, and encode the result. `names` are the files that there are. Returns what
    was found, for people; raises BundleError or TemplateError."""
    from qwen_export.runtimes.text.chat_template import ChatTemplate
    from qwen_export.runtimes.text.stopping import stop_ids
    from qwen_export.runtimes.text.text_tokenizer import TextTokenizer

    config = read_json_file(directory / TOKENIZER_CONFIG) if TOKENIZER_CONFIG in names else {}
    generation = read_json_file(directory / GENERATION_CONFIG) if GENERATION_CONFIG in names else {}
    found, tokenizer = [], None
    if TOKENIZER in names:
        tokenizer = TextTokenizer.from_file(directory / TOKENIZER)
        if not tokenizer.encode(_QUESTION):
            raise BundleError(
                "the tokenizer makes no tokens of a text",
                where=str(directory / TOKENIZER),
                got=repr(_QUESTION),
                fix="Copy tokenizer.json from the checkpoint again.",
            )
        stop_ids(tokenizer, generation)
        found.append("tokenizer loads")
    if CHAT_TEMPLATE in names:
        special = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
        rendered = ChatTemplate(read_text_file(directory / CHAT_TEMPLATE), special).render([{"role": "user", "content": _QUESTION}])
        if tokenizer is not None:
            tokenizer.encode(rendered)
        found.append("template renders")
    return ", ".join(found) or "none: token ids only"


def read_text_file(path: Path) -> str:
    """A text file of a bundle. Raises BundleError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError("a text file cannot be read as UTF-8", where=str(path), got=error, fix="Save the file as UTF-8.") from error


def read_json_file(path: Path) -> dict[str, Any]:
    """A JSON object of a bundle. Raises BundleError."""
    try:
        value = json.loads(read_text_file(path))
    except (ValueError, RecursionError) as error:
        raise BundleError("a file is not valid JSON", where=str(path), got=error, fix="Copy it from the checkpoint again.") from error
    if not isinstance(value, dict):
        raise BundleError(
            "a file is not a JSON object", where=str(path), got=type(value).__name__, fix="Copy it from the checkpoint again."
        )
    return value
