"""Which files of a repository a build reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from qwen_export.downloads.hub_options import HubName
from qwen_export.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TEXTS = (
    *("config.json", "generation_config.json", "hf_quant_config.json", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/*.jinja", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
)
"""Patterns of everything but weights."""

_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_DRAFT_HEAD = "mtp"


def texts(names: Iterable[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in TEXTS)]


def weights(names: Collection[str], listed: Collection[str]) -> list[str]:
    """The safetensors files: those `listed` in the index, or the single file; and a file of the draft head beside them."""
    own = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    main = {SINGLE} if SINGLE in own and SINGLE not in listed else set(listed) or set(own)
    return [name for name in own if name in main or _DRAFT_HEAD in name]


def gguf(name: HubName, names: Collection[str]) -> list[str]:
    """The files of one GGUF model. Raises CheckpointError where the repository has none of that name, or several."""
    models: dict[str, list[str]] = {}
    for file in sorted(names):
        if file.endswith(".gguf") and not any(word in file.lower() for word in ("mmproj", "imatrix")):
            models.setdefault(_PART.sub(".gguf", file), []).append(file)
    if not models:
        raise CheckpointError(
            "the repository has no weights that are read",
            where=str(name),
            expected="safetensors or GGUF files",
            fix="Give a repository that has them.",
        )
    wanted = {model: files for model, files in models.items() if name.file.lower() in model.rpartition("/")[2].lower()}
    if len(wanted) != 1:
        raise CheckpointError(
            "the repository has several GGUF models" if wanted or not name.file else "the repository has no such GGUF model",
            where=str(name),
            got=", ".join(list(wanted or models)[:12]),
            fix=f"Name one of them, such as {name.model}:Q8_0.",
        )
    return next(iter(wanted.values()))
