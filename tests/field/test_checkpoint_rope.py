"""Rope fields in every place where transformers accepts them: the frequencies are those of transformers, or the field is refused."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

from qwen_export.errors import ConfigError
from qwen_export.graphs.config import parse_config
from qwen_export.graphs.rope_scaling import with_rope_scaling
from qwen_export.graphs.rotary import rotary_frequencies
from tests.support.family import tiny_config

YARN = {"rope_type": "yarn", "factor": 4.0}
ORIGINAL = "original_max_position_embeddings"


def flat(rope: dict[str, Any] | None = None, drop: tuple[str, ...] = (), **text: Any) -> dict[str, Any]:
    raw = copy.deepcopy(tiny_config(vision=False, head_dim=64, max_position_embeddings=4096))
    raw["rope_parameters"] = {k: v for k, v in {**raw["rope_parameters"], "mrope_section": None, **(rope or {})}.items() if k not in drop}
    raw["rope_parameters"].pop("mrope_section")
    return {key: value for key, value in {**raw, **text}.items() if key not in drop}


def older(scaling: dict[str, Any] | None, **text: Any) -> dict[str, Any]:
    """The form without rope_parameters."""
    return flat(drop=("rope_parameters",), rope_scaling=scaling, rope_theta=1e6, **text)


ACCEPTED: dict[str, dict[str, Any]] = {
    "default": flat(),
    "yarn": flat({**YARN, ORIGINAL: 1024}),
    "yarn, original length from max_position_embeddings": flat(YARN),
    "yarn, original length beside rope_parameters": flat(YARN, **{ORIGINAL: 1024}),
    "yarn, both original lengths: the outer one": flat({**YARN, ORIGINAL: 2048}, **{ORIGINAL: 1024}),
    "yarn, factor null": flat({"rope_type": "yarn", "factor": None, ORIGINAL: 1024}),
    "yarn, betas": flat({**YARN, ORIGINAL: 1024, "beta_fast": 16, "beta_slow": 2}),
    "yarn, betas null and zero": flat({**YARN, ORIGINAL: 1024, "beta_fast": None, "beta_slow": 0}),
    "yarn, attention factor": flat({**YARN, ORIGINAL: 1024, "attention_factor": 1.25}),
    "yarn, attention factor null": flat({**YARN, ORIGINAL: 1024, "attention_factor": None}),
    "yarn, mscale": flat({**YARN, ORIGINAL: 1024, "mscale": 1.0, "mscale_all_dim": 0.5}),
    "yarn, mscale alone": flat({**YARN, ORIGINAL: 1024, "mscale": 2.0}),
    "yarn, truncate false": flat({**YARN, ORIGINAL: 1024, "truncate": False}),
    "yarn, truncate null": flat({**YARN, ORIGINAL: 1024, "truncate": None}),
    "yarn, type for rope_type": flat({"type": "yarn", "factor": 4.0, ORIGINAL: 1024}, drop=("rope_type",)),
    "yarn, factor below 1": flat({"rope_type": "yarn", "factor": 0.5, ORIGINAL: 1024}),
    "factor of rotation beside rope_parameters": flat(drop=("partial_rotary_factor",), partial_rotary_factor=0.5)
    | {"partial_rotary_factor": 0.5},
    "factor of rotation missing": flat(drop=("partial_rotary_factor",)),
    "theta beside rope_parameters": flat(drop=("rope_theta",)) | {"rope_theta": 5e5},
    "two thetas: the inner one": flat() | {"rope_theta": 5e5},
    "older form": older(None),
    "older form, yarn": older({"type": "yarn", "factor": 2.0, ORIGINAL: 1024}),
    "older form, yarn, original length outside": older({"rope_type": "yarn", "factor": 2.0}, **{ORIGINAL: 512}),
    "original length without yarn": flat(**{ORIGINAL: 1024}),
}


@pytest.mark.parametrize("form", ACCEPTED)
def test_frequencies_are_those_of_transformers(form: str) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    raw = ACCEPTED[form]
    ours, scaling = rotary_frequencies(parse_config(raw).text)
    settings = {key: value for key, value in copy.deepcopy(raw).items() if key not in ("architectures", "model_type")}
    theirs = Qwen3_5TextRotaryEmbedding(Qwen3_5TextConfig(**settings))
    np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=3e-7)
    assert scaling == pytest.approx(theirs.attention_scaling, rel=1e-12)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "yarn with theta 1": (flat({**YARN, ORIGINAL: 1024, "rope_theta": 1.0}), "rope_theta"),
    "theta of 1e300": (flat({"rope_theta": 1e300}), "rope_theta"),
    "theta missing": (flat(drop=("rope_theta",)), "rope_theta"),
    "factor of 1e300": (flat({**YARN, "factor": 1e300}), "factor"),
    "no factor": (flat({"rope_type": "yarn"}), "factor"),
    "a beta next to nothing": (flat({**YARN, "beta_fast": 1e-300}), "beta_fast"),
    "an original length of 10^400": (flat({**YARN, ORIGINAL: 10**400}), ORIGINAL),
    "yarn, original length null": (flat({**YARN, ORIGINAL: 1024}, **{ORIGINAL: None}), ORIGINAL),
    "yarn keys without yarn": (flat({"factor": 4.0}), "factor"),
    "per layer kind": (flat() | {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
    "llama3": (flat({"rope_type": "llama3"}), "llama3"),
    "rotation of more than a head": (flat({"partial_rotary_factor": 2.0}), "partial_rotary_factor"),
    "rotation of 1e300 heads": (flat({"partial_rotary_factor": 1e300}), "partial_rotary_factor"),
    "two scalings": (flat(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_scaling"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_implemented_is_refused_with_its_key(form: str) -> None:
    raw, key = REFUSED[form]
    with pytest.raises(ConfigError, match=key) as raised:
        parse_config(raw)
    assert len(str(raised.value)) < 1000 and raised.value.fix


def test_the_option_replaces_an_original_length_beside_rope_parameters() -> None:
    text = parse_config(with_rope_scaling(flat(**{ORIGINAL: 1024}), "yarn:2")).text
    assert (text.rope.original_max_position_embeddings, text.rope.factor) == (1024, 2.0)
