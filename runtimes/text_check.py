"""Do tokenizer and chat template of a bundle work? Asked by `build` before work, by `verify` and `check`, so that `run` finds no fault
that they let pass."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from qwen_export.errors import BundleError
from qwen_export.manifest import GENERATION_CONFIG, TOKENIZER

_QUESTION = "Is this a test?"


def check_text(directory: Path, names: Collection[str]) -> str:
    """Load the tokenizer, render the template for a question, encode the result, and read the settings, as a run does. `names` are the
    files that there are. Returns what was found, for people; raises BundleError or TemplateError."""
    from qwen_export.runtimes.sampling.generation_config import read_generation_config
    from qwen_export.runtimes.text.text_files import TextFiles

    files, found = TextFiles(directory, names), []
    read_generation_config(files.json(GENERATION_CONFIG), BundleError, str(directory / GENERATION_CONFIG))
    if files.has(TOKENIZER):
        if not files.tokenizer.encode(_QUESTION):
            raise BundleError(
                "the tokenizer makes no tokens of a text",
                where=str(directory / TOKENIZER),
                got=repr(_QUESTION),
                fix="Copy tokenizer.json from the checkpoint again.",
            )
        found.append("tokenizer loads")
    if files.templates:
        rendered = files.template.render([{"role": "user", "content": _QUESTION}])
        if files.has(TOKENIZER):
            files.tokenizer.encode(rendered)
        found.append("template renders")
    return ", ".join(found) or "none: token ids only"
