"""Whether the tokenizer fits the embedding, from tokenizer.json alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_export.graphs.json_file import read_json_object

_TOKENIZER = "tokenizer.json"


def vocabulary_reason(directory: Path, rows: int) -> str:
    """Why the tokenizer of a checkpoint cannot be used with an embedding of `rows` rows, and what to do about it; "" where it can, or where
    there is no tokenizer.

    A token whose id has no row in the embedding would fail when a text has it, not before. Raises CheckpointError for a damaged file."""
    path = directory / _TOKENIZER
    if not path.exists():
        return ""
    last, token = max(_ids(path), default=(-1, ""))
    if last < rows:
        return ""
    return (
        f"{_TOKENIZER} has tokens up to id {last} ({token[:40]!r}), and the embedding has {rows} rows: add rows with transformers "
        f"(model.resize_token_embeddings), or remove the tokens from {rows} on from {_TOKENIZER}"
    )


def _ids(path: Path) -> Iterator[tuple[int, str]]:
    """All ids of a tokenizer with their tokens."""
    content = read_json_object(path, "tokenizer")
    model = content.get("model")
    vocabulary: Any = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from ((number, token) for token, number in vocabulary.items() if type(number) is int)
    added = content.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and type(entry.get("id")) is int:
            yield entry["id"], str(entry.get("content"))
