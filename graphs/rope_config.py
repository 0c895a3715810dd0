"""The rotary embedding in config.json: where its fields may be, and which values are implemented.

Fields and defaults are those of transformers 5.17 (`modeling_rope_utils.py`): `rope_parameters`, or the older form with `rope_theta`,
`partial_rotary_factor` and `rope_scaling` beside each other. A rope key that is dropped gives a model that is wrong only at long context,
so an unknown one is an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from qwen_export.errors import ConfigError
from qwen_export.graphs.config_fields import Fields, shown

KEYS = frozenset({"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"})
"""The keys of a model's configuration that this module reads."""

_ORIGINAL = "original_max_position_embeddings"
_ROPE_KEYS = {"rope_type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}
_YARN_KEYS = {"factor", _ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "truncate", "mscale", "mscale_all_dim"}
_LONGEST_DOCUMENTED = 1_010_000
# Powers of theta are fp32 values.
_LARGEST_THETA = 1e30
_LARGEST_FACTOR = 1e6


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


def parse_rope(f: Fields) -> RopeConfig:
    """The rotary embedding of the text configuration `f`. Raises ConfigError."""
    source = _source(f)
    kind = source.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise f.wrong("rope_type", kind, "'default' or 'yarn'")
    allowed = _ROPE_KEYS | (_YARN_KEYS if kind == "yarn" else set())
    unknown = sorted(set(source) - allowed)
    if unknown:
        raise ConfigError(
            "unknown rope parameters would change the model and are not implemented",
            where=f.where,
            got=", ".join(unknown)[:200],
            expected=", ".join(sorted(allowed)),
            fix="Use the rope parameters of the model card.",
        )
    r = Fields(source, f.where)
    section = source.get("mrope_section") or []
    if not isinstance(section, list) or not all(type(n) is int and n > 0 for n in section):
        raise r.wrong("mrope_section", section, "a list of positive integers")
    if section:
        r.must_be("mrope_interleaved", True)
    base = RopeConfig(
        theta=r.number("rope_theta", maximum=_LARGEST_THETA),
        partial_rotary_factor=r.number("partial_rotary_factor", 0.25),
        mrope_section=tuple(section),
    )
    return _yarn(f, r, base) if kind == "yarn" else base


def longest_context(stored: int, rope: RopeConfig) -> int:
    """Tokens that the model can read: the number in config.json, or the original context times the factor of YaRN. Releases keep the
    original number and give the longer one in the model card: 1010000 for a factor of 4, a little less than four times 262144."""
    stretched = int(rope.factor * rope.original_max_position_embeddings)
    return max(stored, min(stretched, _LONGEST_DOCUMENTED))


def _source(f: Fields) -> dict[str, Any]:
    """All rope fields in one object, those inside `rope_parameters` first."""
    given, scaling = f.data.get("rope_parameters"), f.data.get("rope_scaling")
    for key, value in (("rope_parameters", given), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise f.wrong(key, value, "a JSON object")
    if given is not None and scaling is not None and given != scaling:
        raise f.wrong("rope_scaling", scaling, "nothing beside rope_parameters")
    source = dict(given if given is not None else scaling or {})
    older = source.pop("type", None)
    if older is not None:
        source.setdefault("rope_type", older)
    for key in ("rope_theta", "partial_rotary_factor"):
        if f.data.get(key) is not None:
            source.setdefault(key, f.data[key])
    return source


def _yarn(f: Fields, r: Fields, base: RopeConfig) -> RopeConfig:
    """Defaults as in transformers: a null is a missing value, except that a null `truncate` is false; 0 is the default of a beta."""
    original = f.integer(_ORIGINAL) if _ORIGINAL in f.data else None  # beside rope_parameters: it has priority, null is an error
    if original is None:
        stored = r.data.get(_ORIGINAL)
        original = r.integer(_ORIGINAL) if stored is not None else f.integer("max_position_embeddings")
    if base.theta <= 1:
        raise r.wrong("rope_theta", base.theta, "a number above 1, with the rope type 'yarn'")
    if "factor" in r.data and r.data["factor"] is None:
        factor = f.integer("max_position_embeddings") / original
    else:
        factor = r.number("factor", maximum=_LARGEST_FACTOR)
    return replace(
        base,
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=_beta(r, "beta_fast", 32.0),
        beta_slow=_beta(r, "beta_slow", 1.0),
        attention_factor=_attention_factor(r, factor),
        truncate=False if "truncate" in r.data and r.data["truncate"] is None else r.boolean("truncate", True),
    )


def _beta(r: Fields, key: str, default: float) -> float:
    value = r.data.get(key)
    if value is None or (value == 0 and not isinstance(value, bool)):
        return default
    number = r.number(key, maximum=_LARGEST_FACTOR)
    if number < 1 / _LARGEST_FACTOR:
        raise r.wrong(key, shown(value), f"a number of at least {1 / _LARGEST_FACTOR:g}")
    return number


def _attention_factor(r: Fields, factor: float) -> float:
    """The factor on cos and sin: stored, or 0.1 m ln(factor) + 1 (arXiv 2309.00071, section 3.4), with `mscale` as m."""
    if r.data.get("attention_factor") is not None:
        return r.number("attention_factor", maximum=_LARGEST_FACTOR)

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if r.data.get("mscale") and r.data.get("mscale_all_dim"):
        return scale(r.number("mscale", maximum=_LARGEST_FACTOR)) / scale(r.number("mscale_all_dim", maximum=_LARGEST_FACTOR))
    return scale(1.0)
