"""The names under which tools store the tensors of the family, and the names of the releases.

A name is a chain of wrappers (`base_model.model.` of PEFT, `module.` of data parallel training, `language_model.model.` of transformers 4)
before the name of the tensor within its part. The part tells where the release has it, so the mapping is certain:

    layers.N.*, embed_tokens.*, norm.*   the decoder: `model.language_model.` beside a vision tower, else `model.`
    lm_head.*, mtp.*                     without a prefix
    visual.*                             `model.visual.`

Two stored names with one name of the release are two sets of weights, and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo

MTP_PREFIX, VISION_PREFIX = "mtp.", "model.visual."

_WRAPPERS = frozenset({"base_model", "model", "language_model", "module", "_orig_mod", "pretrained_model", "text_model"})
_DECODER = re.compile(r"(layers\.\d+|embed_tokens|norm)\.")
_ALONE = re.compile(r"(lm_head|mtp)\.")
_VISION = re.compile(r"(visual|vision_tower|vision_model)\.")
# What PEFT puts into the names of modules that it changed.
_ADAPTER = re.compile(r"\.(lora_[A-Za-z]\w*|base_layer|modules_to_save|original_module|ia3_l|oft_[A-Z]\w*|hada_w\w*)\b")
# Heads of training and classification beside the LM head: reward and value models, token and sequence classifiers.
_OTHER_HEAD = re.compile(r"(v_head|value_head|reward_head|score|classifier|classification_head|qa_outputs|regression_head)\.")


def released_names(tensors: Mapping[str, TensorInfo], decoder_prefix: str) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors by their names in the releases, without heads that no text model has, and notes. A name whose part is not known stays.

    Raises CheckpointError for the tensors of an adapter, and for two tensors with one name."""
    refuse_adapter_tensors(tensors)
    found: dict[str, TensorInfo] = {}
    heads, renamed = [], {}
    for name, info in tensors.items():
        prefix, inner = split_name(name)
        if _OTHER_HEAD.match(inner):
            heads.append(name)
            continue
        released = _released(prefix, inner, decoder_prefix)
        if released in found:
            raise CheckpointError(
                "the checkpoint has two sets of weights under different prefixes",
                where=released,
                got=f"{found[released].stored_name} and {name}",
                fix="Remove one of them.",
            )
        if released != name:
            renamed[name.removesuffix(inner)] = released.removesuffix(inner)
        found[released] = replace(info, name=released, stored_name=name)
    notes = [f"tensors are stored as {old or '(no prefix)'}* and read as {new}*" for old, new in renamed.items()]
    if heads:
        notes.append(f"ignored heads that are not part of a text model: {', '.join(sorted(heads)[:4])}")
    return found, notes


def release_name(name: str, decoder_prefix: str) -> str:
    """The name in a release of a tensor that a tool calls `name`."""
    return _released(*split_name(name), decoder_prefix)


def split_name(name: str) -> tuple[str, str]:
    """Wrappers, and the name within the part."""
    rest = name
    while True:
        head, dot, tail = rest.partition(".")
        if not dot or head not in _WRAPPERS:
            return name.removesuffix(rest), rest
        rest = tail


def refuse_adapter_tensors(names: Iterable[str]) -> None:
    """Raise CheckpointError where weights are stored with an adapter beside them, which was not merged."""
    found = next((name for name in names if _ADAPTER.search(name)), None)
    if found is not None:
        raise CheckpointError(
            "the weights hold a LoRA adapter that is not merged",
            where=found,
            fix="Merge it (peft: merge_and_unload, then save_pretrained), and give the directory of the result.",
        )


def unknown_prefixes(names: Iterable[str]) -> list[str]:
    """Of names that belong to no known part: what is before the first number or the last two words, each once."""
    short = [re.split(r"\.\d+\.", name)[0] if re.search(r"\.\d+\.", name) else ".".join(name.split(".")[:-2]) or name for name in names]
    return list(dict.fromkeys(f"{prefix}." for prefix in short))


def _released(prefix: str, inner: str, decoder_prefix: str) -> str:
    if _DECODER.match(inner):
        return decoder_prefix + inner
    if _ALONE.match(inner):
        return inner
    if _VISION.match(inner):
        return VISION_PREFIX + inner.partition(".")[2]
    return prefix + inner
