"""The typed model configuration, read from config.json and validated before anything else happens.

Only fields that change the computation are kept. A value that this code does not implement is an error, never ignored, and so is a key
that it does not know (`config_keys.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen_export.errors import ConfigError, UnsupportedError
from qwen_export.graphs.config_fields import Fields, shown
from qwen_export.graphs.config_keys import DRAFT_LAYERS, check_keys
from qwen_export.graphs.json_file import read_json_object
from qwen_export.graphs.rope_config import RopeConfig, longest_context, parse_rope
from qwen_export.graphs.rope_scaling import with_rope_scaling
from qwen_export.manifest import MANIFEST

DENSE_TYPES = ("qwen3_5", "qwen3_5_text")
MOE_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
NEXT_TYPES = ("qwen3_next",)
FULL, LINEAR = "full_attention", "linear_attention"

# Far above the family's largest (92 layers, 512 experts), so that a hostile number costs neither time nor memory.
_MOST_LAYERS, _MOST_EXPERTS, _MOST_LAYER_EXPERTS = 1024, 8192, 1 << 18
_LARGEST_CONFIG = 16 << 20


@dataclass(frozen=True)
class TextConfig:
    """The text decoder. Sizes in elements; heads as Hq Hkv (attention) and Hk Hv (Gated DeltaNet)."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...] = ()
    mtp_num_hidden_layers: int = 0
    num_experts: int = 0
    """Experts of each layer, 0 in a dense model."""
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of each attention head (an even number)."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """C: the channels of the causal convolution, q | k | v."""
        return 2 * self.key_dim + self.value_dim

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for the bundle's manifest."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class CheckpointConfig:
    """The contents of config.json: the text model and the parts beside it."""

    text: TextConfig
    architecture: str
    text_prefix: str
    """Prefix of the decoder's tensors: "model.language_model." beside a vision tower, else "model."."""
    tied_flags: tuple[bool, ...] = ()
    """The different values of tie_word_embeddings, which both levels of a nested configuration may have."""
    draft_layers: int | None = None
    """Layers of the draft head that config.json announces, None where it has no such key."""
    vision: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)


_ARCHITECTURES = {
    "Qwen3_5ForConditionalGeneration": (DENSE_TYPES, "model.language_model."),
    "Qwen3_5ForCausalLM": (DENSE_TYPES, "model."),
    "Qwen3_5MoeForConditionalGeneration": (MOE_TYPES, "model.language_model."),
    "Qwen3_5MoeForCausalLM": (MOE_TYPES, "model."),
    "Qwen3NextForCausalLM": (NEXT_TYPES, "model."),
}


def load_config(directory: Path, rope_scaling: str | None = None) -> CheckpointConfig:
    """Read and validate `directory`/config.json. `rope_scaling`, such as "yarn:4", replaces the scaling in the file. Raises ConfigError
    with the key that is wrong."""
    path = directory / "config.json"
    if not path.exists():
        if (directory / MANIFEST).is_file():
            raise ConfigError(
                "this is a bundle, not a checkpoint",
                where=str(directory),
                fix="See what is in it with `qwen-export inspect`, and whether it runs here with `qwen-export check`.",
            )
        raise ConfigError(
            "no config.json in the checkpoint directory",
            where=str(directory),
            fix="Give the directory that a Qwen3.5 / Qwen3.6 release unpacks to.",
        )
    raw = read_json_object(path, "config.json", ConfigError, _LARGEST_CONFIG)
    return parse_config(raw if rope_scaling is None else with_rope_scaling(raw, rope_scaling), where=str(path))


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> CheckpointConfig:
    """Validate the contents of a config.json."""
    architectures = raw.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else "nothing"
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise UnsupportedError(
            "this checkpoint's architecture is not one of the Qwen3.5 / Qwen3.6 / Qwen3-Next family",
            where=where,
            got=name if isinstance(name, str) and len(name) < 100 else shown(name),
            expected=", ".join(_ARCHITECTURES),
            fix="Give a text model of the family, saved with its LM head.",
        )
    types, prefix = _ARCHITECTURES[name]
    nested = raw.get("text_config")
    text = nested if isinstance(nested, dict) else raw
    f, outer = Fields(text, where), Fields(raw, where)
    model_type = text.get("model_type", raw.get("model_type"))
    if model_type not in types:
        raise f.wrong("model_type", model_type, " or ".join(types))
    check_keys(raw, text, where)
    quantization = raw.get("quantization_config") or text.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise f.wrong("quantization_config", quantization, "a JSON object")
    tied, draft = _tied(f, outer), _draft_layers(f, outer)
    return CheckpointConfig(
        # transformers reads the outer flag of a nested configuration, and the inner one where that is missing is what remains.
        text=_parse_text(f, model_type, tied=tied[0] if tied else False, draft_layers=draft, eos=_eos_ids(f, outer)),
        architecture=name,
        text_prefix=prefix,
        tied_flags=tuple(dict.fromkeys(tied)),
        draft_layers=draft,
        vision=raw.get("vision_config") if "ConditionalGeneration" in name else None,
        quantization=quantization,
        raw=raw,
    )


def _tied(f: Fields, outer: Fields) -> list[bool]:
    """The values of tie_word_embeddings, the outer one first."""
    return [level.boolean("tie_word_embeddings", False) for level in (outer, f) if level.data.get("tie_word_embeddings") is not None]


def _draft_layers(f: Fields, outer: Fields) -> int | None:
    found = {level.integer(key, minimum=0) for level in (f, outer) for key in DRAFT_LAYERS if level.data.get(key) is not None}
    if len(found) > 1:
        raise f.wrong(" and ".join(DRAFT_LAYERS), sorted(found), "one number of layers of the draft head")
    return found.pop() if found else None


def _eos_ids(f: Fields, outer: Fields) -> tuple[int, ...]:
    return tuple(dict.fromkeys((*_ids(f, "eos_token_id"), *_ids(outer, "eos_token_id"))))


def _parse_text(f: Fields, model_type: str, *, tied: bool, draft_layers: int | None, eos: tuple[int, ...]) -> TextConfig:
    f.must_be("hidden_act", "silu")
    f.must_be("attention_bias", False, None)
    f.must_be("attn_output_gate", True)
    f.must_be("output_gate_type", "silu", "swish", None)
    f.must_be("mtp_use_dedicated_embeddings", False, None)
    f.must_be("mlp_only_layers", [], None)
    f.must_be("decoder_sparse_step", 1)
    f.must_be("norm_topk_prob", True)
    f.must_be("use_sliding_window", False, None)
    moe, rope = model_type in MOE_TYPES + NEXT_TYPES, parse_rope(f)
    config = TextConfig(
        model_type=model_type,
        vocab_size=f.integer("vocab_size"),
        hidden_size=f.integer("hidden_size"),
        intermediate_size=0 if moe else f.integer("intermediate_size"),
        layer_types=_layer_types(f),
        num_attention_heads=f.integer("num_attention_heads"),
        num_key_value_heads=f.integer("num_key_value_heads"),
        head_dim=f.integer("head_dim"),
        linear_num_key_heads=f.integer("linear_num_key_heads"),
        linear_num_value_heads=f.integer("linear_num_value_heads"),
        linear_key_head_dim=f.integer("linear_key_head_dim"),
        linear_value_head_dim=f.integer("linear_value_head_dim"),
        linear_conv_kernel_dim=f.integer("linear_conv_kernel_dim", 4, minimum=2),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        rope=rope,
        max_position_embeddings=longest_context(f.integer("max_position_embeddings"), rope),
        tie_word_embeddings=tied,
        eos_token_ids=eos,
        # Qwen3-Next releases have a draft head that their configuration does not mention.
        mtp_num_hidden_layers=draft_layers if draft_layers is not None else int(model_type in NEXT_TYPES),
        num_experts=f.integer("num_experts", maximum=_MOST_EXPERTS) if moe else 0,
        num_experts_per_tok=f.integer("num_experts_per_tok") if moe else 0,
        moe_intermediate_size=f.integer("moe_intermediate_size") if moe else 0,
        shared_expert_intermediate_size=f.integer("shared_expert_intermediate_size") if moe else 0,
    )
    _check_sizes(f, config)
    return config


def _check_sizes(f: Fields, config: TextConfig) -> None:
    """Raise ConfigError for sizes that do not fit each other."""
    for what, many, few in (
        ("num_attention_heads", config.num_attention_heads, config.num_key_value_heads),
        ("linear_num_value_heads", config.linear_num_value_heads, config.linear_num_key_heads),
    ):
        if many % few:
            raise f.wrong(what, many, f"a multiple of {few}")
    if config.num_experts_per_tok > config.num_experts:
        raise f.wrong("num_experts_per_tok", config.num_experts_per_tok, f"at most num_experts, {config.num_experts}")
    if config.num_layers * config.num_experts > _MOST_LAYER_EXPERTS:
        raise f.wrong("num_experts", config.num_experts, f"at most {_MOST_LAYER_EXPERTS} experts in all layers")
    factor = config.rope.partial_rotary_factor
    if not 0 < factor <= 1 or config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim:
        raise f.wrong("partial_rotary_factor", factor, "a factor up to 1 that rotates an even number of dimensions")
    if config.rope.mrope_section and sum(config.rope.mrope_section) != config.rotary_dim // 2:
        raise f.wrong("mrope_section", list(config.rope.mrope_section), f"numbers that sum to {config.rotary_dim // 2}")


def _layer_types(f: Fields) -> tuple[str, ...]:
    count = f.integer("num_hidden_layers", maximum=_MOST_LAYERS)
    given = f.data.get("layer_types")
    if given is None:
        every = f.integer("full_attention_interval", 4)
        return tuple(FULL if (i + 1) % every == 0 else LINEAR for i in range(count))
    if not isinstance(given, list) or len(given) != count or any(t not in (FULL, LINEAR) for t in given):
        raise f.wrong("layer_types", given, f"{count} entries of {FULL!r} or {LINEAR!r}")
    return tuple(given)


def _ids(f: Fields, key: str) -> tuple[int, ...]:
    value = f.data.get(key)
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(type(v) is int and 0 <= v < 2**31 for v in values):
        raise f.wrong(key, value, "a token id or a list of them")
    return tuple(values)
