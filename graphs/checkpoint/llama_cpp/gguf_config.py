"""The metadata of a GGUF file as the contents of a config.json.

Facts: `conversion/qwen.py` and `src/models/qwen35*.cpp` of llama.cpp. A key of the architecture that is not known may change the model,
and is refused like one of config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_export.errors import CheckpointError, ConfigError, UnsupportedError
from qwen_export.graphs.config_fields import shown
from qwen_export.graphs.json_file import AGAIN

ARCHITECTURES = {
    "qwen35": ("Qwen3_5ForCausalLM", "qwen3_5_text"),
    "qwen35moe": ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"),
    "qwen3next": ("Qwen3NextForCausalLM", "qwen3_next"),
}
"""By llama.cpp's name: the class and the model type of transformers."""

NEXTN = "nextn_predict_layers"
TILED = "ssm.v_head_reordered"
"""Of files that ollama converts: whether value heads are in the order of llama.cpp."""

_SIZES = {
    "hidden_size": "embedding_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "linear_key_head_dim": "ssm.state_size",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
# Keys with the values that are implemented, where they are there.
_FIXED: dict[str, tuple[Any, ...]] = {
    "expert_weights_scale": (0, 1),
    "expert_weights_norm": (True,),
    "expert_gating_func": (1,),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "leading_dense_block_count": (0,),
    "attention.causal": (True,),
    "rope.mrope_interleaved": (True,),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_attn_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
}
_READ = frozenset(
    {
        *_SIZES.values(),
        *_EXPERTS.values(),
        *("block_count", "feed_forward_length", "vocab_size", "attention.value_length", "ssm.inner_size", "full_attention_interval"),
        *("attention.recurrent_layers", NEXTN, TILED, "expert_shared_count", "tensor_data_layout", "rope.scaling.finetuned"),
        *("rope.freq_base", "rope.dimension_count", "rope.dimension_sections", "rope.scaling.type", "rope.scaling.factor"),
        *("rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    }
)
_VISION = ("vision.", "clip.", "image_", "mm.")


def architecture_of(metadata: Mapping[str, Any], where: Path) -> str:
    """llama.cpp's name of the architecture. Raises UnsupportedError for another family, CheckpointError for what is no model."""
    name, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if kind == "adapter":
        raise CheckpointError(
            "this GGUF file holds a LoRA adapter, not a model",
            where=str(where),
            fix="Give the file of the model that it adapts.",
        )
    if name == "clip" or kind == "mmproj":
        raise CheckpointError(
            "this GGUF file holds a vision tower (mmproj), not a text model", where=str(where), fix="Give the file of the model beside it."
        )
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            "this GGUF file's architecture is not one of the Qwen3.5 / Qwen3.6 / Qwen3-Next family",
            where=str(where),
            got=shown(name),
            expected=", ".join(ARCHITECTURES),
            fix="Give a text model of the family.",
        )
    return str(name)


def config_of(metadata: Mapping[str, Any], vocabulary: int, *, tied: bool, where: Path) -> dict[str, Any]:
    """The contents of a config.json, for `parse_config`. `vocabulary`: rows of the embedding; `tied`: no LM head is stored."""
    name = architecture_of(metadata, where)
    own = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    _check_keys(own, where)
    fields = _Fields(own, where)
    architecture, model_type = ARCHITECTURES[name]
    drafts = fields.integer(NEXTN, 0)
    layers = fields.integer("block_count") - drafts
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": vocabulary,
        "num_hidden_layers": layers,
        "tie_word_embeddings": tied,
        "mtp_num_hidden_layers": drafts,
        "rope_parameters": _rope(fields),
    }
    config |= {key: fields.single(stored) for key, stored in _SIZES.items()}
    heads, inner = config["linear_num_value_heads"], fields.integer("ssm.inner_size")
    config["linear_value_head_dim"] = inner // heads if isinstance(heads, int) and heads and inner % heads == 0 else None
    recurrent = own.get("attention.recurrent_layers")
    if isinstance(recurrent, list):
        config["layer_types"] = ["linear_attention" if flag else "full_attention" for flag in recurrent[:layers]]
    else:
        config["full_attention_interval"] = fields.integer("full_attention_interval", 4)
    if name == "qwen35":
        config["intermediate_size"] = fields.single("feed_forward_length")
    else:
        config |= {key: fields.single(stored) for key, stored in _EXPERTS.items()}
    return config


def shortest(value: float) -> float:
    """The decimal that an fp32 number was made from: 1e-06 of 9.999999974752427e-07."""
    return float(str(np.float32(value)))


class _Fields:
    """Values of the architecture's keys, without its name."""

    def __init__(self, values: Mapping[str, Any], where: Path) -> None:
        self.values, self.where = values, where

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or value < 0:
            raise self.wrong(key, value, "a whole number")
        return value

    def single(self, key: str) -> Any:
        """One number; of a list with one per layer the one that is not 0."""
        value = self.values.get(key)
        if isinstance(value, list):
            different = set(value) - {0}
            if len(different) != 1:
                raise self.wrong(key, value, "the same number in all layers")
            value = different.pop()
        if value is None:
            raise self.wrong(key, value, "a number")
        return shortest(value) if isinstance(value, float) else value

    def wrong(self, key: str, got: Any, expected: str) -> ConfigError:
        return ConfigError(
            f"metadata key {key!r} of the GGUF file cannot be used",
            where=str(self.where),
            got="nothing" if got is None else shown(got),
            expected=expected,
            fix=AGAIN,
        )


def _check_keys(own: Mapping[str, Any], where: Path) -> None:
    fields = _Fields(own, where)
    unknown = [key for key in own if key not in _READ and key not in _FIXED and not key.startswith(_VISION)]
    if unknown:
        raise ConfigError(
            "the GGUF file has keys that may change the model and are not implemented",
            where=str(where),
            got=", ".join(shown(key) for key in unknown[:8]),
            expected="the keys that llama.cpp writes for this architecture",
            fix="Convert the model again with llama.cpp, or give its safetensors.",
        )
    for key, allowed in _FIXED.items():
        if key in own and not any(own[key] == value for value in allowed):
            raise fields.wrong(key, own[key], " or ".join(map(str, allowed)))


def _rope(fields: _Fields) -> dict[str, Any]:
    own = fields.values
    head, rotated = fields.single("attention.key_length"), fields.integer("rope.dimension_count")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": fields.single("rope.freq_base")}
    rope["partial_rotary_factor"] = rotated / head if head else None
    sections = own.get("rope.dimension_sections")
    section = [n for n in sections if n] if isinstance(sections, list) else []
    # The converter writes the sections of the releases for models that have none. Where they do not fit, all axes are the same.
    if section and 2 * sum(section) == rotated:
        rope |= {"mrope_section": section, "mrope_interleaved": True}
    kind = own.get("rope.scaling.type", "none")
    if kind not in ("none", "yarn"):
        raise fields.wrong("rope.scaling.type", kind, "'none' or 'yarn'")
    if kind == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": fields.single("rope.scaling.factor"),
            "original_max_position_embeddings": fields.integer("rope.scaling.original_context_length"),
        }
        for name, key in (("beta_fast", "rope.scaling.yarn_beta_fast"), ("beta_slow", "rope.scaling.yarn_beta_slow")):
            if own.get(key):
                rope[name] = fields.single(key)
    return rope
