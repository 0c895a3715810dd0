"""`rope_scaling="yarn:4"`: a longer context, by the edit of config.json that the model cards document, made while the file is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_export.errors import ParameterError

_ORIGINAL = "original_max_position_embeddings"
# The keys of an earlier scaling. Other keys stay, so that unknown ones are still refused.
_SCALING_KEYS = {"rope_type", "type", "factor", "beta_fast", "beta_slow", "attention_factor", "truncate"}
_SCALING_KEYS |= {"mscale", "mscale_all_dim", _ORIGINAL}


def yarn_factor(scaling: str) -> float:
    """The factor of "yarn:FACTOR". Raises ParameterError for anything else."""
    kind, _, number = scaling.partition(":")
    try:
        factor = float(number)
    except ValueError:
        factor = 0.0
    if kind != "yarn" or not 1 < factor <= 64:
        raise ParameterError(
            "this scaling of the rotary embedding is not known",
            parameter="rope_scaling",
            got=scaling,
            expected="yarn:FACTOR, with a factor above 1 and at most 64",
            fix="Give yarn:4, which the model cards document for 1010000 tokens, or yarn:2 for half of that.",
        )
    return factor


def with_rope_scaling(raw: Mapping[str, Any], scaling: str) -> dict[str, Any]:
    """The contents of a config.json with this scaling instead of its own. The original context is that of an earlier scaling, else
    max_position_embeddings."""
    factor = yarn_factor(scaling)
    nested = raw.get("text_config")
    text = dict(nested if isinstance(nested, dict) else raw)
    given = text.get("rope_parameters")
    before = given if given is not None else text.get("rope_scaling") or {}
    if not isinstance(before, dict):
        return dict(raw)  # the configuration is refused for that
    rope = {key: value for key, value in before.items() if key not in _SCALING_KEYS}
    original = text.pop(_ORIGINAL, None) or before.get(_ORIGINAL) or text.get("max_position_embeddings")
    rope |= {"rope_type": "yarn", "factor": factor, _ORIGINAL: original}
    text.pop("rope_scaling", None)
    text["rope_parameters" if given is not None else "rope_scaling"] = rope
    return {**raw, "text_config": text} if isinstance(nested, dict) else text
