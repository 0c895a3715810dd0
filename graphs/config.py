"""The typed model configuration, read from config.json and validated before anything else happens.

Only fields that change the computation are kept. A value that this code does not implement is an error, never ignored: a rope key that
is silently dropped gives a model that is wrong only at long context.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_export.errors import ConfigError, UnsupportedError
from qwen_export.graphs.rope_scaling import with_rope_scaling
from qwen_export.manifest import MANIFEST

DENSE_TYPES = ("qwen3_5", "qwen3_5_text")
MOE_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
NEXT_TYPES = ("qwen3_next",)
FULL, LINEAR = "full_attention", "linear_attention"

_ROPE_KEYS = {"rope_type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}
_LONGEST_DOCUMENTED = 1_010_000
_YARN_KEYS = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the attention layers; `kind` is "default" or "yarn"."""

    theta: float
    partial_rotary_factor: float
    mrope_section: tuple[int, ...] = ()
    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


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
    """What config.json says: the text model and what lies beside it."""

    text: TextConfig
    architecture: str
    text_prefix: str
    """Prefix of the decoder's tensors: "model.language_model." beside a vision tower, else "model."."""
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


class _Fields:
    """Typed access to one JSON object; every complaint names the file and the key."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.data.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.wrong(key, value, f"an integer >= {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.data.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def must_be(self, key: str, *allowed: Any) -> None:
        """The only values implemented; a missing key means the first one."""
        value = self.data.get(key, allowed[0])
        if value not in allowed:
            raise self.wrong(key, value, " or ".join(map(repr, allowed)))

    def wrong(self, key: str, got: Any, expected: str) -> ConfigError:
        shown = "nothing" if got is None else repr(got)
        return ConfigError(f"config value {key!r} cannot be used", where=self.where, got=shown, expected=expected)


def load_config(directory: Path, rope_scaling: str | None = None) -> CheckpointConfig:
    """Read and validate `directory`/config.json. `rope_scaling`, like "yarn:4", takes the place of the file's. Raises ConfigError with the
    key that is wrong."""
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (directory / MANIFEST).is_file():
            raise ConfigError(
                "this is a bundle, not a checkpoint",
                where=str(directory),
                fix="See what is in it with `qwen-export inspect`, and whether it runs here with `qwen-export check`.",
            ) from None
        raise ConfigError(
            "no config.json in the checkpoint directory",
            where=str(directory),
            fix="Give the directory that a Qwen3.5 / Qwen3.6 release unpacks to.",
        ) from None
    except OSError as error:
        raise ConfigError("config.json cannot be read", where=str(path), got=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError("config.json is not valid JSON", where=str(path), got=error) from error
    if not isinstance(raw, dict):
        raise ConfigError("config.json is not a JSON object", where=str(path), got=type(raw).__name__)
    return parse_config(raw if rope_scaling is None else with_rope_scaling(raw, rope_scaling), where=str(path))


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> CheckpointConfig:
    """Validate the contents of a config.json."""
    architectures = raw.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else "nothing"
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise UnsupportedError(
            "this checkpoint's architecture is not one of the Qwen3.5 / Qwen3.6 / Qwen3-Next family",
            where=where,
            got=name,
            expected=", ".join(_ARCHITECTURES),
        )
    types, prefix = _ARCHITECTURES[name]
    nested = raw.get("text_config")
    text = nested if isinstance(nested, dict) else raw
    model_type = text.get("model_type", raw.get("model_type"))
    if model_type not in types:
        raise ConfigError("config value 'model_type' cannot be used", where=where, got=repr(model_type), expected=" or ".join(types))
    vision = raw.get("vision_config") if "ConditionalGeneration" in name else None
    tied = text.get("tie_word_embeddings", raw.get("tie_word_embeddings", False))
    if not isinstance(tied, bool):
        raise ConfigError("config value 'tie_word_embeddings' cannot be used", where=where, got=repr(tied), expected="true or false")
    quantization = raw.get("quantization_config") or text.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise ConfigError(
            "config value 'quantization_config' cannot be used", where=where, got=repr(quantization), expected="a JSON object"
        )
    return CheckpointConfig(
        text=_parse_text(_Fields(text, where), model_type, tied),
        architecture=name,
        text_prefix=prefix,
        vision=vision,
        quantization=quantization,
        raw=raw,
    )


def _parse_text(f: _Fields, model_type: str, tied: bool) -> TextConfig:
    f.must_be("hidden_act", "silu")
    f.must_be("attention_bias", False)
    f.must_be("attn_output_gate", True)
    f.must_be("output_gate_type", "silu", "swish", None)
    f.must_be("mtp_use_dedicated_embeddings", False)
    f.must_be("mlp_only_layers", [], None)
    f.must_be("decoder_sparse_step", 1)
    f.must_be("norm_topk_prob", True)
    moe, rope = model_type in MOE_TYPES + NEXT_TYPES, _rope(f)
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
        eos_token_ids=_ids(f, "eos_token_id"),
        # Qwen3-Next releases have a draft head that their configuration does not mention.
        mtp_num_hidden_layers=f.integer("mtp_num_hidden_layers", 1 if model_type in NEXT_TYPES else 0, minimum=0),
        num_experts=f.integer("num_experts") if moe else 0,
        num_experts_per_tok=f.integer("num_experts_per_tok") if moe else 0,
        moe_intermediate_size=f.integer("moe_intermediate_size") if moe else 0,
        shared_expert_intermediate_size=f.integer("shared_expert_intermediate_size") if moe else 0,
    )
    for what, many, few in (
        ("num_attention_heads", config.num_attention_heads, config.num_key_value_heads),
        ("linear_num_value_heads", config.linear_num_value_heads, config.linear_num_key_heads),
    ):
        if many % few:
            raise f.wrong(what, many, f"a multiple of {few}")
    if config.num_experts_per_tok > config.num_experts:
        raise f.wrong("num_experts_per_tok", config.num_experts_per_tok, f"at most num_experts, {config.num_experts}")
    if config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim:
        raise f.wrong("partial_rotary_factor", config.rope.partial_rotary_factor, "a factor that rotates an even number of dimensions")
    if config.rope.mrope_section and sum(config.rope.mrope_section) != config.rotary_dim // 2:
        raise f.wrong("mrope_section", list(config.rope.mrope_section), f"numbers that sum to {config.rotary_dim // 2}")
    return config


def _layer_types(f: _Fields) -> tuple[str, ...]:
    count = f.integer("num_hidden_layers")
    given = f.data.get("layer_types")
    if given is None:
        every = f.integer("full_attention_interval", 4)
        return tuple(FULL if (i + 1) % every == 0 else LINEAR for i in range(count))
    if not isinstance(given, list) or len(given) != count or any(t not in (FULL, LINEAR) for t in given):
        raise f.wrong("layer_types", given, f"{count} entries of {FULL!r} or {LINEAR!r}")
    return tuple(given)


def _rope(f: _Fields) -> RopeConfig:
    """`rope_parameters`, or the older spread-out form (rope_theta, partial_rotary_factor, rope_scaling)."""
    given = f.data.get("rope_parameters")
    scaling = f.data.get("rope_scaling")
    for key, value in (("rope_parameters", given), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise f.wrong(key, value, "a JSON object")
    if given is not None and scaling is not None and given != scaling:
        raise f.wrong("rope_scaling", scaling, "nothing beside rope_parameters")
    source = dict(given if given is not None else scaling or {})
    if "type" in source:
        source.setdefault("rope_type", source.pop("type"))
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in f.data:
            source.setdefault(key, f.data[key])
    kind = source.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise f.wrong("rope_type", kind, "'default' or 'yarn'")
    if kind == "yarn":
        source = {key: value for key, value in source.items() if value is not None or key not in _YARN_KEYS}
    unknown = set(source) - _ROPE_KEYS - (_YARN_KEYS if kind == "yarn" else set())
    if unknown:
        raise ConfigError(
            "unknown rope parameters would change the model and are not implemented",
            where=f.where,
            got=", ".join(sorted(unknown)),
            expected=", ".join(sorted(_ROPE_KEYS | (_YARN_KEYS if kind == "yarn" else set()))),
        )
    r = _Fields(source, f.where)
    section = source.get("mrope_section") or []
    if not isinstance(section, list) or not all(type(n) is int and n > 0 for n in section):
        raise r.wrong("mrope_section", section, "a list of positive integers")
    if section:
        r.must_be("mrope_interleaved", True)
    base = RopeConfig(
        theta=r.number("rope_theta"), partial_rotary_factor=r.number("partial_rotary_factor", 0.25), mrope_section=tuple(section)
    )
    if kind == "default":
        return base
    factor = r.number("factor")
    return replace(
        base,
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=r.integer("original_max_position_embeddings", f.integer("max_position_embeddings")),
        beta_fast=r.number("beta_fast", 32.0),
        beta_slow=r.number("beta_slow", 1.0),
        attention_factor=r.number("attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0),
        truncate=r.boolean("truncate", True),
    )


def longest_context(stored: int, rope: RopeConfig) -> int:
    """Tokens that the model can read: config.json's number, or what YaRN stretches the original context to. Releases leave their number at
    the original context and name the longer one in the model card: 1010000 for a factor of 4, a little less than four times 262144."""
    stretched = int(rope.factor * rope.original_max_position_embeddings)
    return max(stored, min(stretched, _LONGEST_DOCUMENTED))


def _ids(f: _Fields, key: str) -> tuple[int, ...]:
    value = f.data.get(key)
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise f.wrong(key, value, "a token id or a list of them")
    return tuple(values)
