"""The text half of a bundle: tokenizer, chat templates, generation settings, copied from the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qwen_export.errors import CheckpointError, TemplateError
from qwen_export.manifest import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG
from qwen_export.runtimes.sampling.generation_config import GenerationDefaults, read_generation_config
from qwen_export.runtimes.text.chat_template import DEFAULT
from qwen_export.runtimes.text.text_files import SPECIAL_TOKENS_MAP, TEMPLATE_SET, TextFiles


def check_text_assets(checkpoint: Path) -> list[str]:
    """Raise CheckpointError, before any work, for what a run could not use: a tokenizer that cannot be read, a template that is not valid,
    settings that are out of range or not implemented. Returns notes about what is left out."""
    files = TextFiles(checkpoint, error=CheckpointError)
    generation = _generation(checkpoint)
    if files.has(TOKENIZER):
        _ = files.tokenizer
    elif (checkpoint / "vocab.json").exists():
        raise CheckpointError(
            "the checkpoint has no tokenizer.json",
            where=str(checkpoint),
            fix="Save it once with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...).",
        )
    if files.templates:
        try:
            _ = files.template
        except TemplateError as error:
            raise CheckpointError(
                error.what, where=f"{checkpoint}, {error.where}".rstrip(", "), got=error.got, expected=error.expected, fix=error.fix
            ) from error
    return [f"generation_config.json: {name} is not a key of transformers, and has no influence" for name in generation.unknown]


def copy_text_assets(checkpoint: Path, bundle: Path) -> list[str]:
    """Copy what is there; returns the names written. Templates in other places become chat_template.jinja and chat_templates.json."""
    written = []
    for name in (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, GENERATION_CONFIG, CHAT_TEMPLATE):
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, bundle / name)
            written.append(name)
    templates = TextFiles(checkpoint, error=CheckpointError).templates
    if CHAT_TEMPLATE not in written and DEFAULT in templates:
        (bundle / CHAT_TEMPLATE).write_text(templates[DEFAULT], encoding="utf-8", newline="")
        written.append(CHAT_TEMPLATE)
    others = {name: source for name, source in templates.items() if name != DEFAULT}
    if others:
        (bundle / TEMPLATE_SET).write_text(json.dumps(others, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        written.append(TEMPLATE_SET)
    return written


def stop_ids(checkpoint: Path, config_ids: tuple[int, ...]) -> tuple[int, ...]:
    """End-of-sequence ids of config.json and generation_config.json together: either alone is wrong for some releases."""
    return tuple(sorted({*config_ids, *_generation(checkpoint).stop_ids}))


def _generation(checkpoint: Path) -> GenerationDefaults:
    values = TextFiles(checkpoint, error=CheckpointError).json(GENERATION_CONFIG)
    return read_generation_config(values, CheckpointError, str(checkpoint / GENERATION_CONFIG))
