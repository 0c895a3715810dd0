"""Attention caches in fp16, int8 and fp8: what rows keep, what a bundle makes of a text, and what cannot be built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_export import build
from qwen_export.bundles.bundle_summary import inspect_bundle
from qwen_export.cache_formats import CACHE_FORMATS, CACHE_PRECISIONS
from qwen_export.errors import ParameterError, UnsupportedError
from qwen_export.graphs.ops.cache_rows import CACHE_DTYPES, row_values, stored_rows
from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.verification.logit_check import verify
from tests.support.kernel_families import needs_plugin

KEPT = pytest.mark.parametrize("kept", CACHE_PRECISIONS)
# What a needle's text costs more, in nats a token, than with caches of fp32.
NEEDLE = {"fp16": 0.01, "int8": 0.05, "fp8": 0.25}


@KEPT
def test_rows_are_the_nearest_that_a_format_has(kept: str) -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 50, 24)) * 10.0 ** np.arange(-2, 1)[:, None, None]).float()
    values[1, 7] = 0.0
    form = CACHE_FORMATS[kept]
    rows = stored_rows(values, CACHE_DTYPES[kept])
    assert rows.shape[-1] == form.width(24) and rows.element_size() * rows.shape[-1] == form.row_bytes(24)
    back = row_values(rows, 24, torch.float32)
    largest = values.abs().amax(-1, keepdim=True)
    step = {"int8": largest / 254, "fp16": values.abs() * 2**-11, "fp8": (values.abs() / 16).clamp(min=2.0**-10)}[kept]
    assert bool(((back - values).abs() <= 1.001 * step + 1e-7).all())
    assert not back[1, 7].any()


@KEPT
def test_what_is_too_large_becomes_the_largest(kept: str) -> None:
    back = row_values(stored_rows(torch.tensor([[1e6, -1e6, 1.0]]), CACHE_DTYPES[kept]), 3, torch.float32)
    assert bool(torch.isfinite(back).all()) and back[0, 0] == -back[0, 1] > 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "onnx"}, "target onnx keeps attention caches in the precision of the activations, fp32, not in int8"),
        ({"target": "directml", "device": "dml", "precision": "fp16"}, "target directml keeps attention caches"),
        ({"target": "tensorrt", "device": "cuda", "precision": "fp16"}, "target tensorrt keeps attention caches"),
    ],
)
def test_targets_without_such_caches_say_so(options: dict[str, Any], message: str, demo_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        build(demo_checkpoint, tmp_path / "bundle", cache_precision="int8", **options)
    assert not list(tmp_path.iterdir())


def test_kernels_of_onnxruntime_have_no_such_caches(demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_EXPORT_CPU_PLUGIN", "")
    with pytest.raises(UnsupportedError, match=r"GroupQueryAttention has no int8 caches"):
        build(demo_checkpoint, tmp_path / "bundle", cache_precision="int8")


def test_a_format_that_there_is_not(demo_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="cache_precision"):
        build(demo_checkpoint, tmp_path / "bundle", cache_precision="int2")


@pytest.fixture(scope="module")
def bundles(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("caches")
    return {kept: build(demo_checkpoint, directory / kept, cache_precision=kept) for kept in CACHE_PRECISIONS}


@pytest.fixture
def model(bundles: dict[str, Path], kept: str) -> Iterator[Model]:
    with load(bundles[kept], threads=2) as made:
        yield made


def text(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 4000, count).tolist()


@needs_plugin
@pytest.mark.parametrize("kept", ["int8"])
def test_a_bundle_is_verified_with_the_same_rounding(bundles: dict[str, Path], demo_checkpoint: Path, kept: str) -> None:
    result = verify(bundles[kept], demo_checkpoint)
    assert result["passed"], result
    assert "caches" in {check["name"] for check in result["checks"]}


@needs_plugin
@KEPT
def test_a_token_of_context_takes_what_the_format_says(bundles: dict[str, Path], kept: str) -> None:
    """Two layers and the draft head have keys and values of two heads of 64."""
    assert inspect_bundle(bundles[kept])["sequence"]["token_bytes"] == 3 * 2 * 2 * CACHE_FORMATS[kept].row_bytes(64)
    assert inspect_bundle(bundles[kept])["formats"]["attention cache"] == kept


@needs_plugin
@KEPT
def test_every_way_to_read_gives_the_same_bits(model: Model, kept: str) -> None:
    """Prompts, steps, verifies of which some is kept, batches, and a snapshot in another decoder."""
    ids = text(330)
    alone = model.decoder()
    whole = np.array(alone.read(ids))
    decoder = model.decoder(3)
    decoder.prefill(ids[:300], 1)
    decoder.prefill(text(40, 1), 0)
    decoder.prefill(text(7, 2), 2)
    for token in ids[300:310]:
        assert decoder.step([5, token, 9]) is not None
    [rows] = decoder.run([Read(1, [*ids[310:313], 77], commit=False, logits=4)])
    np.testing.assert_array_equal(rows.array[:3], whole[310:313])
    decoder.accept(3, 1)
    np.testing.assert_array_equal(decoder.step([1, ids[313], 2])[1], whole[313])
    other = model.decoder(2)
    other.restore(decoder.snapshot(1), 1)
    np.testing.assert_array_equal(other.step([3, ids[314]])[1], whole[314])


@needs_plugin
@KEPT
def test_drafts_change_no_text(bundles: dict[str, Path], kept: str) -> None:
    texts = []
    for speculate in ("off", 4):
        with load(bundles[kept], threads=2, speculate=speculate) as model:
            request = Request(text(20), Sampler(SamplingParams(greedy=True)), (), 40)
            texts.append(list(model.generate(request, Statistics())))
    assert texts[0] == texts[1]


@needs_plugin
@pytest.mark.parametrize("length", [2000, pytest.param(8000, marks=pytest.mark.slow)])
def test_a_needle_at_the_beginning_of_a_long_context(bundles: dict[str, Path], demo_bundle: Path, length: int) -> None:
    """A definition that is read first is written again, thousands of tokens later, as surely as with caches of fp32."""
    with load(demo_bundle, threads=2) as model:
        tokenizer = model.tokenizer
        wanted, forgotten = (needle(model, *lines(tokenizer, length, seen=seen)) for seen in (True, False))
    assert wanted > forgotten + 1.0, "the model does not look back so far"
    for kept, most in NEEDLE.items():
        with load(bundles[kept], threads=2) as model:
            assert needle(model, *lines(tokenizer, length, seen=True)) > wanted - most, kept


HEAD, KEY = "\ndef _read_quarry_ledger(", "self, marble: Quarry, violin_depth: int = 7319) -> Ledger:"


def lines(tokenizer: Any, length: int, *, seen: bool) -> tuple[list[int], list[int]]:
    """A text of so many tokens that ends with the head of a definition, at its beginning whole where `seen`; and the tokens that follow."""
    code = (Path(__file__).parent / "data" / "held_out.py.txt").read_text(encoding="utf-8")
    head, key = tokenizer.encode(HEAD), tokenizer.encode(KEY)
    filler = tokenizer.encode(code)
    while len(filler) < length:
        filler += filler
    room = length - 2 * (len(head) + len(key))
    return [*filler[:100], *((*head, *key) if seen else ()), *filler[100:room], *head], key


def needle(model: Model, ids: list[int], key: list[int]) -> float:
    """Mean log probability of the key behind a text."""
    decoder = model.decoder()
    decoder.prefill(ids[:-1])
    rows = np.array(decoder.read([ids[-1], *key[:-1]]), np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return float(rows[np.arange(len(key)), key].mean())
