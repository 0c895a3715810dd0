"""Which tensors a text decoder is made of, and what else its checkpoint may hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.formats.logical_tensor import PLAIN_TYPES
from qwen_export.graphs.checkpoint.stored_heads import why_no_draft_head
from qwen_export.graphs.checkpoint.stored_prefixes import MTP_PREFIX, VISION_PREFIX, unknown_prefixes
from qwen_export.graphs.checkpoint.tensor_table import LayerLayout, Layout, decoder_layer, tensor_table, vision_tower
from qwen_export.graphs.config import FULL, CheckpointConfig, TextConfig
from qwen_export.graphs.vision_config import VisionConfig

_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")
_FIRST_EXPERT, _GROUPED_INPUTS = "mlp.experts.0.", "linear_attn.in_proj_qkvz."
_SHOWN = 4
_MLX = "The tensor is stored as MLX stores it. Give the release that the MLX model was converted from."
_VISION = "visual."
"""What the names of the vision tower begin with, in those of the modules."""


@dataclass(frozen=True)
class StoredLayout:
    """How each decoder layer of a checkpoint is stored, found by the names that are there. Layers are known by the prefix of their tensors
    in the names of the modules: "layers.7." in the decoder, "mtp.layers.0." in the draft head."""

    per_expert: frozenset[str]
    grouped_inputs: frozenset[str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        prefix = checkpoint.config.text_prefix
        return cls.found(name.removeprefix(prefix) for name in checkpoint.tensors)

    @classmethod
    def found(cls, names: Iterable[str]) -> Self:
        """From names of tensors, or of what a quantized checkpoint has in their places: scales and packed values under the same stems."""
        per_expert, grouped = set(), set()
        for name in names:
            if _FIRST_EXPERT in name:
                per_expert.add(name.split(_FIRST_EXPERT)[0])
            elif _GROUPED_INPUTS in name:
                grouped.add(name.split(_GROUPED_INPUTS)[0])
        return cls(frozenset(per_expert), frozenset(grouped))

    def layer(self, prefix: str) -> LayerLayout:
        """Of the layer whose tensors start with `prefix`."""
        return LayerLayout(prefix not in self.per_expert, prefix in self.grouped_inputs)


def decoder_tensors(config: TextConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter of the decoder: as stored, where the checkpoint stores one tensor per parameter."""
    for entry in tensor_table(_keys(config), Layout(with_mtp=False)):
        yield entry.name.removeprefix("model."), entry.shape


def layer_tensors(config: TextConfig, prefix: str, kind: str, stored: StoredLayout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name, in the names of the modules, and shape of every tensor that a checkpoint stores for one decoder layer of `kind`."""
    return decoder_layer(prefix, _keys(config), kind, stored.layer(prefix))


def stored_tensors(config: TextConfig, stored: StoredLayout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name, in the names of the modules, and shape of every tensor that a checkpoint stores for the decoder."""
    yield "embed_tokens.weight", (config.vocab_size, config.hidden_size)
    for i, kind in enumerate(config.layer_types):
        yield from layer_tensors(config, f"layers.{i}.", kind, stored)
    yield "norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)


def mtp_tensors(config: TextConfig, stored: StoredLayout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The same for the draft head."""
    hidden = config.hidden_size
    yield "mtp.fc.weight", (hidden, 2 * hidden)
    yield from layer_tensors(config, "mtp.layers.0.", FULL, stored)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield f"mtp.{name}.weight", (hidden,)


def vision_tensors(config: VisionConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The same for the vision tower."""
    for name, shape in vision_tower(config.keys()):
        yield name.removeprefix("model."), shape


def no_tower(checkpoint: Checkpoint) -> str:
    """Why the checkpoint has no vision tower; "" where it has one."""
    if checkpoint.config.vision is None:
        return "config.json describes no vision tower"
    stored = any(name.startswith(VISION_PREFIX) for name in checkpoint.tensors)
    return "" if stored else f"config.json describes a vision tower, but no tensor {VISION_PREFIX}* is stored"


def _keys(config: TextConfig) -> dict[str, Any]:
    """The configuration by the keys of a config.json."""
    values = asdict(config)
    if not config.is_moe:
        del values["num_experts"]  # its presence makes a layer a mixture of experts
    return values


def has_mtp(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has a draft head that can be read."""
    return not no_draft_head(checkpoint)


def no_draft_head(checkpoint: Checkpoint) -> str:
    """Why the checkpoint has no draft head that can be read; "" where it has one."""
    return why_no_draft_head(checkpoint.config, checkpoint.tensors)


def stored_name(config: CheckpointConfig, name: str) -> str:
    """The checkpoint's name of a tensor of decoder, draft head or vision tower."""
    if name.startswith(_VISION):
        return VISION_PREFIX + name.removeprefix(_VISION)
    return name if name == "lm_head.weight" or name.startswith(MTP_PREFIX) else config.text_prefix + name


def stored_dtypes(checkpoint: Checkpoint) -> dict[str, str]:
    """The dtype of each tensor that is stored for decoder, draft head and vision tower, by its name among the modules."""
    config, have, stored = checkpoint.config, checkpoint.weights, StoredLayout.of(checkpoint)
    names = [name for name, _ in (*stored_tensors(config.text, stored), *mtp_tensors(config.text, stored))]
    found = {name: have[stored_name(config, name)].dtype for name in names if stored_name(config, name) in have}
    tower = {name: weight.dtype for name, weight in have.items() if name.startswith(VISION_PREFIX)}
    return found | {_VISION + name.removeprefix(VISION_PREFIX): dtype for name, dtype in tower.items()}


def check_tensors(checkpoint: Checkpoint, *, mtp: bool = True, vision: VisionConfig | None = None) -> None:
    """Raise CheckpointError unless every tensor of the decoder and, with `mtp`, of its draft head, and of the tower `vision` is stored in
    its shape, and no tensor is stored that has no use."""
    config = checkpoint.config
    stored = StoredLayout.of(checkpoint)
    tensors = [*stored_tensors(config.text, stored), *(mtp_tensors(config.text, stored) if mtp and has_mtp(checkpoint) else ())]
    tensors += vision_tensors(vision) if vision is not None else ()
    wanted = {stored_name(config, name): shape for name, shape in tensors}
    have = checkpoint.weights
    missing = [name for name in wanted if name not in have]
    unused = [name for name in have if name not in wanted and not _allowed(config, name)]
    if missing:
        raise _missing(checkpoint, missing, len(wanted), unused)
    for name, shape in wanted.items():
        if have[name].shape != shape:
            raise _misshaped(name, have[name].shape, shape)
        if have[name].dtype not in PLAIN_TYPES:
            raise CheckpointError(
                "a tensor has an element type that cannot be read as a plain weight",
                where=name,
                got=have[name].dtype,
                expected=", ".join(PLAIN_TYPES),
                fix="If it is quantized, config.json must have its quantization_config. Else give the BF16 release.",
            )
    if unused:
        raise CheckpointError(
            f"{len(unused)} tensors of the checkpoint belong to no part of the model that config.json describes",
            where=str(checkpoint.path),
            got=_some(unused),
            expected="tensors of the decoder, the draft head (mtp.*) and the vision tower (visual.*)",
            fix="Use the config.json of the model that the tensors are from.",
        )


def _missing(checkpoint: Checkpoint, missing: list[str], wanted: int, unused: list[str]) -> CheckpointError:
    config = checkpoint.config
    what, where = f"{len(missing)} of {wanted} tensors of the model are not in the checkpoint", str(checkpoint.path)
    if len(missing) == wanted and unused:
        return CheckpointError(
            "the checkpoint's tensors have names of another model",
            where=where,
            got=f"the prefix {', '.join(unknown_prefixes(unused)[:_SHOWN])}",
            expected=f"the prefix {config.text_prefix}",
            fix="Save the model with transformers (save_pretrained), or rename its tensors.",
        )
    if missing == ["lm_head.weight"]:
        return CheckpointError(
            "config.json does not tie the LM head to the embedding, and no head is stored",
            where=where,
            expected="lm_head.weight",
            fix="Is a shard missing? If the model has no head of its own, set tie_word_embeddings to true in config.json.",
        )
    fix = "Is a shard missing, or is config.json from another model?"
    if all(name.startswith(MTP_PREFIX) for name in missing):
        fix += " To build without the draft head, give {mtp}."
    if all(name.startswith(VISION_PREFIX) for name in missing):
        fix += " To build for text only, give {vision} as False."
    return CheckpointError(what, where=where, got=f"without {_some(missing)}", fix=fix)


def _misshaped(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
    fix = "Use the config.json of the model that the tensors are from."
    if name.endswith(".conv1d.weight") and len(got) == 3 and got == (expected[0], expected[2], expected[1]):
        fix = _MLX
    if name.endswith(".patch_embed.proj.weight") and len(got) == 5 and (got[0], got[4], *got[1:4]) == expected:
        fix = _MLX
    return CheckpointError("a tensor has another shape than in config.json", where=name, got=got, expected=expected, fix=fix)


def _allowed(config: CheckpointConfig, name: str) -> bool:
    """Vision tower and draft head are parts of their own; a tied head may be stored beside the embedding."""
    tied_head = name == "lm_head.weight" and config.text.tie_word_embeddings
    return name.startswith((MTP_PREFIX, VISION_PREFIX)) or tied_head or bool(_NOT_WEIGHTS.search(name))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
