"""Where config.json and the stored tensors may disagree: whether the LM head is the embedding, and whether there is a draft head.

The stored values count. transformers 5 does the same for the LM head: where flag and values disagree it keeps both matrices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qwen_export.errors import CheckpointError, ConfigError
from qwen_export.graphs.checkpoint.file_access import SharedFile
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo
from qwen_export.graphs.checkpoint.stored_prefixes import MTP_PREFIX
from qwen_export.graphs.config import NEXT_TYPES, CheckpointConfig
from qwen_export.graphs.config_keys import DRAFT_LAYERS

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")
_BLOCK = 4 << 20


def decide_head(config: CheckpointConfig, tensors: Mapping[str, TensorInfo]) -> tuple[bool, list[str]]:
    """Whether the LM head is the embedding, and notes. Raises ConfigError where the flags disagree and no head is stored."""
    flags = config.tied_flags
    if not any(name.startswith("lm_head.") for name in tensors):
        if len(flags) > 1:
            raise ConfigError(
                "config.json has two values of tie_word_embeddings, and no LM head is stored",
                got="true and false",
                expected="true at both levels, or a stored lm_head.weight",
                fix="Set tie_word_embeddings to true in config.json, beside and inside text_config, if the model has no head of its own.",
            )
        return any(flags), []
    if not any(flags):
        return False, []
    head, embedding = tensors.get(_HEAD), tensors.get(config.text_prefix + _EMBEDDING)
    if head is not None and embedding is not None and _same_values(head, embedding):
        return True, []
    return False, ["config.json ties the LM head to the embedding, but another head is stored; the stored head is used"]


def decide_draft_head(config: CheckpointConfig, tensors: Mapping[str, TensorInfo]) -> tuple[int, list[str]]:
    """Layers of the draft head, and notes."""
    stored = {int(found[1]) for name in tensors if (found := _LAYER.match(name)) and len(found[1]) < 6}
    if config.draft_layers is None and stored and config.text.model_type not in NEXT_TYPES:
        return len(stored), [f"a draft head (mtp.*) is stored, and config.json does not set {DRAFT_LAYERS[0]}; it is used"]
    return config.text.mtp_num_hidden_layers, []


def why_no_draft_head(config: CheckpointConfig, tensors: Mapping[str, TensorInfo]) -> str:
    """Why a build of this checkpoint can have no draft head; "" where it can."""
    stored = sum(name.startswith(MTP_PREFIX) for name in tensors)
    layers = config.text.mtp_num_hidden_layers
    if not stored:
        announced = config.draft_layers or 0
        return (
            f"config.json sets {DRAFT_LAYERS[0]} to {announced}, but no tensor mtp.* is stored"
            if announced
            else "the checkpoint has no draft head (mtp.*)"
        )
    if layers == 0:
        return f"config.json sets {DRAFT_LAYERS[0]} to 0, although {stored} tensors mtp.* are stored; set it to 1 to use them"
    return f"its draft head has {layers} layers, and only one is implemented" if layers > 1 else ""


def _same_values(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two tensors have the same bytes. Stops at the first block that differs."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if (a.file, a.offset) == (b.file, b.offset):
        return True
    files = [SharedFile(info.file) for info in (a, b)]
    try:
        buffers = [memoryview(bytearray(min(_BLOCK, a.nbytes))) for _ in files]
        for done in range(0, a.nbytes, _BLOCK):
            parts = [buffer[: min(_BLOCK, a.nbytes - done)] for buffer in buffers]
            for file, part, info in zip(files, parts, (a, b), strict=True):
                if not file.read_into(part, info.offset + done):
                    raise CheckpointError(
                        "the weight file ends inside a tensor", where=f"{info.file}, tensor {info.name}", fix="Copy it again."
                    )
            if parts[0] != parts[1]:
                return False
    except OSError as error:
        raise CheckpointError("a weight file cannot be read", where=str(a.file), got=error.strerror, fix="Make it readable.") from error
    finally:
        for file in files:
            file.close()
    return True
