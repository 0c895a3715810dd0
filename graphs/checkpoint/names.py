"""Which tensors a text decoder is made of, and what else may lie in its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.directory import Checkpoint
from qwen_export.graphs.checkpoint.tensor_table import Layout, tensor_table
from qwen_export.graphs.config import CheckpointConfig, TextConfig

MTP_PREFIX, VISION_PREFIX = "mtp.", "model.visual."
_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")
_SHOWN = 4


def decoder_tensors(config: TextConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name (that of the module's parameter) and stored shape of every tensor of the decoder."""
    values = asdict(config)
    if not config.is_moe:
        del values["num_experts"]  # its presence is what tells the layouts apart
    for entry in tensor_table(values, Layout(with_mtp=False)):
        yield entry.name.removeprefix("model."), entry.shape


def mtp_tensors(config: TextConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The same for the draft head."""
    values = asdict(config)
    if not config.is_moe:
        del values["num_experts"]
    for entry in tensor_table(values, Layout(with_vision=False)):
        if entry.name.startswith(MTP_PREFIX):
            yield entry.name, entry.shape


def has_mtp(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint comes with a draft head: its configuration may name one that a converter dropped."""
    return checkpoint.config.text.mtp_num_hidden_layers > 0 and any(name.startswith(MTP_PREFIX) for name in checkpoint.tensors)


def stored_name(config: CheckpointConfig, name: str) -> str:
    """The checkpoint's name of a decoder parameter."""
    return name if name == "lm_head.weight" or name.startswith(MTP_PREFIX) else config.text_prefix + name


def stored_dtypes(checkpoint: Checkpoint) -> dict[str, str]:
    """The dtype that each tensor of decoder and draft head is stored in, by the name of its parameter."""
    config, have = checkpoint.config, checkpoint.weights
    names = [name for name, _ in (*decoder_tensors(config.text), *mtp_tensors(config.text))]
    return {name: have[stored_name(config, name)].dtype for name in names if stored_name(config, name) in have}


def check_tensors(checkpoint: Checkpoint, *, mtp: bool = True) -> None:
    """Every tensor of the decoder and, with `mtp`, of its draft head is there in its shape; nothing lies beside it that nobody reads."""
    config = checkpoint.config
    tensors = [*decoder_tensors(config.text), *(mtp_tensors(config.text) if mtp and has_mtp(checkpoint) else ())]
    wanted = {stored_name(config, name): shape for name, shape in tensors}
    have = checkpoint.weights
    missing = [name for name in wanted if name not in have]
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors of the model are missing from the checkpoint",
            where=str(checkpoint.path),
            got=_some(missing),
            fix="Is a shard missing, or is config.json from another model?"
            + (" To build without the draft head, use --no-mtp." if all(n.startswith(MTP_PREFIX) for n in missing) else ""),
        )
    for name, shape in wanted.items():
        if have[name].shape != shape:
            raise CheckpointError("a tensor has another shape than config.json says", where=name, got=have[name].shape, expected=shape)
        if have[name].dtype not in ("BF16", "F16", "F32"):
            raise CheckpointError("a tensor has an element type that cannot be read as a plain weight", where=name, got=have[name].dtype)
    unused = [name for name in have if name not in wanted and not _allowed(config, name)]
    if unused:
        raise CheckpointError(
            f"{len(unused)} tensors of the checkpoint belong to nothing that is exported", where=str(checkpoint.path), got=_some(unused)
        )


def _allowed(config: CheckpointConfig, name: str) -> bool:
    """Vision tower and draft head are parts of their own; a tied head may be stored beside the embedding."""
    tied_head = name == "lm_head.weight" and config.text.tie_word_embeddings
    return name.startswith((MTP_PREFIX, VISION_PREFIX)) or tied_head or bool(_NOT_WEIGHTS.search(name))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
