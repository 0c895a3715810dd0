"""YaRN beyond the context that the model was trained with: tables, the compiled graph and the eager modules, against transformers.

Nobody reads a million tokens in a test. A text of a few tokens gives recurrent states; then both sides get one attention cache of random
keys and values that is a million slots long, and read on behind it, at the positions in question.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

from qwen_export import build
from qwen_export.bundles.inspection import inspect_checkpoint
from qwen_export.commands.inspect import command as inspect_command
from qwen_export.errors import ConfigError, ParameterError, QwenExportError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.config import parse_config
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.graphs.rope_scaling import with_rope_scaling, yarn_factor
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.snapshot import Snapshot
from qwen_export.verification.logit_check import verify
from tests.support.family import FAMILY, tiny_config
from tests.support.synthesize import synthesize

ORIGINAL, STRETCHED = 262_144, 1_010_000
# As the model cards write it.
CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
Logits = npt.NDArray[np.float32]


def config() -> dict[str, Any]:
    """One narrow key/value head: a million slots are 129 MB."""
    raw = tiny_config(vision=False, head_dim=32, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=ORIGINAL)
    raw["rope_parameters"] = {**raw["rope_parameters"], "partial_rotary_factor": 0.5}
    return raw


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(config(), tmp_path_factory.mktemp("yarn") / "checkpoint", with_mtp=False)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkpoint, tmp_path_factory.mktemp("yarn") / "bundle", rope_scaling="yarn:4")


def reference(checkpoint: Path, rope: dict[str, Any]) -> Any:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    settings = Qwen3_5TextConfig.from_pretrained(str(checkpoint))
    settings.rope_parameters = {**settings.rope_parameters, **rope}
    return Qwen3_5ForCausalLM.from_pretrained(str(checkpoint), config=settings, dtype=torch.float32).eval()


# Options and what they change


def test_the_option_is_the_edit_of_the_model_card(checkpoint: Path, bundle: Path) -> None:
    raw = config()
    edited = {**raw, "rope_parameters": {**raw["rope_parameters"], **CARD}}
    assert parse_config(with_rope_scaling(raw, "yarn:4")).text == parse_config(edited).text
    manifest = load_manifest(bundle)
    assert manifest.model == parse_config(edited).text.to_json()
    assert manifest.model["max_position_embeddings"] == STRETCHED
    assert manifest.model["rope"]["kind"] == "yarn" and manifest.model["rope"]["factor"] == 4.0
    assert manifest.source["rope_scaling"] == "yarn:4"
    assert manifest.rotary.scaling == pytest.approx(1.1386294, abs=1e-7)


@pytest.mark.parametrize(("factor", "limit"), [("1.5", 393_216), ("2", 524_288), ("4", STRETCHED), ("8", STRETCHED)])
@pytest.mark.parametrize("name", ["0.8B", "35B-A3B", "next-80B-A3B"])
def test_every_layout_of_the_family(name: str, factor: str, limit: int) -> None:
    text = parse_config(with_rope_scaling(FAMILY[name], f"yarn:{factor}")).text
    assert text.max_position_embeddings == limit
    assert dataclasses.replace(text.rope, kind="default").theta == parse_config(FAMILY[name]).text.rope.theta
    assert (text.rope.kind, text.rope.factor, text.rope.original_max_position_embeddings) == ("yarn", float(factor), ORIGINAL)


def test_the_option_takes_the_place_of_the_files_scaling() -> None:
    raw = config()
    raw["rope_parameters"] |= {**CARD, "factor": 2.0, "beta_fast": 24.0, "attention_factor": 1.5}
    assert parse_config(raw).text.max_position_embeddings == 524_288
    text = parse_config(with_rope_scaling(raw, "yarn:4")).text
    assert text == parse_config(with_rope_scaling(config(), "yarn:4")).text
    raw["rope_parameters"]["beta_quick"] = 1.0
    with pytest.raises(ConfigError, match="beta_quick"):
        parse_config(with_rope_scaling(raw, "yarn:4"))


def test_a_longer_context_in_the_file_stays() -> None:
    raw = {**config(), "max_position_embeddings": 1_048_576}
    raw["rope_parameters"] |= CARD
    assert parse_config(raw).text.max_position_embeddings == 1_048_576


@pytest.mark.parametrize("text", ["yarn", "yarn:", "yarn:x", "yarn:1", "yarn:-4", "yarn:nan", "yarn:inf", "linear:4", "4", ""])
def test_scalings_that_are_not_known(text: str) -> None:
    with pytest.raises(ParameterError, match="yarn:4"):
        yarn_factor(text)


def test_inspect_shows_the_longer_context(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_checkpoint(checkpoint)["model"]["max_context"] == ORIGINAL
    model = inspect_checkpoint(checkpoint, "yarn:4")["model"]
    assert (model["max_context"], model["rope"]) == (STRETCHED, "yarn x4 of 262144")
    inspect_command([str(checkpoint), "--rope-scaling", "yarn:4"], standalone_mode=False)
    assert "context 1010000, rope yarn x4 of 262144" in capsys.readouterr().out


def test_verify_knows_the_scaling(bundle: Path, checkpoint: Path) -> None:
    result = verify(bundle, checkpoint)
    assert result["passed"]
    assert "transformers" in [check["against"] for check in result["checks"]]


# Positions beyond the original context


def test_tables_of_the_runtime_equal_those_of_transformers(bundle: Path, checkpoint: Path) -> None:
    """Every row of the whole context, to the last bits of cos and sin. Angles are fp32 products on both sides."""
    decoder = load(bundle, max_context=STRETCHED).decoder()
    decoder.require_room(0, STRETCHED)
    settings = Qwen3_5TextConfig.from_pretrained(str(checkpoint))
    settings.rope_parameters = {**settings.rope_parameters, **CARD}
    theirs = Qwen3_5TextRotaryEmbedding(settings)
    np.testing.assert_array_equal(np.asarray(decoder.manifest.rotary.inv_freq, np.float32), theirs.inv_freq.numpy())
    positions = torch.arange(STRETCHED)[None, None].expand(3, 1, -1)
    for name, expected in zip(("cos", "sin"), theirs(torch.zeros(1), positions), strict=True):
        got = decoder.tables.of(0)[name].array()
        assert got.shape == (STRETCHED, 8)
        np.testing.assert_allclose(got, expected[0, :, :8].numpy(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("start", [ORIGINAL - 4, STRETCHED - 16])
def test_reading_on_beyond_the_original_context(bundle: Path, checkpoint: Path, start: int) -> None:
    """A prompt, and steps, behind `start` tokens: the compiled graph gives the logits of transformers, and so do the eager modules, whose
    copies of a longer cache would be large."""
    draw = np.random.default_rng(start)
    first, more = draw.integers(0, 480, 9).tolist(), draw.integers(0, 480, 16).tolist()
    # Scores of deviation 5: some keys stand out of a million.
    cache = {"k_cache": draw.standard_normal((1, start, 32), np.float32) * 5, "v_cache": draw.standard_normal((1, start, 32), np.float32)}
    expected = read_by_transformers(reference(checkpoint, CARD), first, cache, more)

    decoder = load(bundle, max_context=STRETCHED).decoder()
    read_by_bundle = continuing(decoder, first, cache)
    assert decoder.lengths == [start]
    got = read_by_bundle(more[:8])
    got = np.concatenate([got, *(decoder.step([token]).copy() for token in more[8:])])
    assert decoder.lengths == [start + 16]
    assert 0.3 < expected.std() < 1.5
    assert np.abs(got - expected).max() <= 1e-4

    if start > ORIGINAL:
        return
    eager = EagerSequence(load_decoder(open_checkpoint(checkpoint, "yarn:4")), start + 16)
    eager.read(first)
    for name, values in cache.items():
        eager.state[3][name][0, :, :start] = torch.from_numpy(values)
    eager.length = start
    assert np.abs(eager.read(more) - expected).max() <= 1e-4
    # The comparison sees the scaling, and single positions.
    unscaled = read_by_transformers(reference(checkpoint, {}), first, cache, more)
    assert np.abs(unscaled - expected).max() > 0.1
    shorter = {name: values[:, 1:] for name, values in cache.items()}
    assert np.abs(read_by_transformers(reference(checkpoint, CARD), first, shorter, more) - expected).max() > 0.1


def continuing(decoder: Decoder, first: list[int], cache: dict[str, Logits]) -> Callable[[list[int]], Logits]:
    """The decoder with the states after `first` and this cache; returns a reader of prompts with all their logits."""
    decoder.prefill(first)
    after = decoder.snapshot()
    (k_name,) = (name for name in after.caches if name.endswith("k_cache"))
    layer = k_name.removesuffix("k_cache")
    start = cache["k_cache"].shape[1]
    caches = {layer + name: np.ascontiguousarray(values).view(np.uint8) for name, values in cache.items()}
    decoder.restore(Snapshot(dataclasses.replace(after.mark, tokens=(*first, *[0] * (start - len(first)))), caches))
    return lambda ids: decoder.read(ids).copy()


@torch.no_grad()
def read_by_transformers(model: Any, first: list[int], cache: dict[str, Logits], more: list[int]) -> Logits:
    past = model(torch.tensor([first]), use_cache=True).past_key_values
    layer = past.layers[3]
    layer.keys, layer.values = torch.from_numpy(cache["k_cache"])[None], torch.from_numpy(cache["v_cache"])[None]
    assert past.get_seq_length() == cache["k_cache"].shape[1]
    return model(torch.tensor([more]), past_key_values=past, use_cache=True).logits[0].numpy()


def test_a_context_beyond_the_stretched_one_is_refused(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(QwenExportError, match="1010000"):
        load(bundle, max_context=STRETCHED + 1).decoder()
    with pytest.raises(QwenExportError, match="1010000"):
        build(checkpoint, tmp_path / "no", rope_scaling="yarn:4", max_context=STRETCHED + 1)
    with pytest.raises(QwenExportError, match="262144"):
        build(checkpoint, tmp_path / "no", max_context=ORIGINAL + 1)
