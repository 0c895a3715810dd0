"""Which tensors a dense text decoder is made of, and what else may lie in its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.directory import Checkpoint
from qwen_export.graphs.config import FULL, CheckpointConfig, TextConfig

MTP_PREFIX, VISION_PREFIX = "mtp.", "model.visual."
_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")
_SHOWN = 4


def decoder_tensors(config: TextConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name (that of the module's parameter) and stored shape of every tensor of a dense decoder."""
    H, D, I = config.hidden_size, config.head_dim, config.intermediate_size  # noqa: E741
    C, K, Hv = config.conv_dim, config.linear_conv_kernel_dim, config.linear_num_value_heads
    yield "embed_tokens.weight", (config.vocab_size, H)
    for i, kind in enumerate(config.layer_types):
        layer = f"layers.{i}."
        yield layer + "input_layernorm.weight", (H,)
        yield layer + "post_attention_layernorm.weight", (H,)
        if kind == FULL:
            mixer = layer + "self_attn."
            yield mixer + "q_proj.weight", (config.num_attention_heads * 2 * D, H)
            yield mixer + "k_proj.weight", (config.num_key_value_heads * D, H)
            yield mixer + "v_proj.weight", (config.num_key_value_heads * D, H)
            yield mixer + "o_proj.weight", (H, config.num_attention_heads * D)
            yield mixer + "q_norm.weight", (D,)
            yield mixer + "k_norm.weight", (D,)
        else:
            mixer = layer + "linear_attn."
            yield mixer + "in_proj_qkv.weight", (C, H)
            yield mixer + "in_proj_z.weight", (config.value_dim, H)
            yield mixer + "in_proj_b.weight", (Hv, H)
            yield mixer + "in_proj_a.weight", (Hv, H)
            yield mixer + "conv1d.weight", (C, 1, K)
            yield mixer + "A_log", (Hv,)
            yield mixer + "dt_bias", (Hv,)
            yield mixer + "norm.weight", (config.linear_value_head_dim,)
            yield mixer + "out_proj.weight", (H, config.value_dim)
        yield layer + "mlp.gate_proj.weight", (I, H)
        yield layer + "mlp.up_proj.weight", (I, H)
        yield layer + "mlp.down_proj.weight", (H, I)
    yield "norm.weight", (H,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, H)


def stored_name(config: CheckpointConfig, name: str) -> str:
    """The checkpoint's name of a decoder parameter."""
    return name if name == "lm_head.weight" else config.text_prefix + name


def check_tensors(checkpoint: Checkpoint) -> None:
    """Every tensor of the decoder is there in its shape, and nothing lies beside it that nobody reads."""
    config = checkpoint.config
    wanted = {stored_name(config, name): shape for name, shape in decoder_tensors(config.text)}
    have = checkpoint.tensors
    missing = [name for name in wanted if name not in have]
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors of the model are missing from the checkpoint",
            where=str(checkpoint.path),
            got=_some(missing),
            fix="Is a shard missing, or is config.json from another model?",
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
