"""Bundles that leave weights in their checkpoint, and `package`, which completes them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qwen_export.building.compiler import build
from qwen_export.bundles.packaging import package
from qwen_export.errors import BuildError, BundleError
from qwen_export.manifest import load_manifest
from qwen_export.plugins.native.native_library import LIBRARIES
from qwen_export.runtimes import load
from qwen_export.runtimes.backends.integrity import ensure_whole
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize
from tests.support.tiny_tokenizer import write_tiny_tokenizer

IDS = np.random.default_rng(0).integers(0, 480, 30).tolist()


@pytest.fixture(scope="module")
def fp32_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored as a CPU bundle wants its weights, in two shards."""
    directory = tmp_path_factory.mktemp("fp32")
    tokenizer = write_tiny_tokenizer(directory / "tokenizer")
    return synthesize(tiny_config(), directory / "checkpoint", dtype="fp32", shards=2, tokenizer=tokenizer)


@pytest.fixture(scope="module", autouse=True)
def no_plugin() -> Iterator[None]:
    """ONNX Runtime's own kernels take most matrices as they are stored; the plugin's take several as one, which is a copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LIBRARIES["cpu"].variable, "")
        yield


@pytest.fixture(scope="module")
def copied(fp32_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(fp32_checkpoint, tmp_path_factory.mktemp("copied") / "bundle")


@pytest.fixture(scope="module")
def referring(fp32_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(fp32_checkpoint, tmp_path_factory.mktemp("referring") / "bundle", weights="reference")


def size(bundle: Path) -> int:
    return sum(path.stat().st_size for path in bundle.iterdir() if path.name.endswith(".weights"))


def logits(bundle: Path, **options: bool) -> np.ndarray:
    return load(bundle, max_context=64, **options).decoder().read(IDS).copy()


def test_only_what_needs_a_transform_is_copied(referring: Path, copied: Path, fp32_checkpoint: Path) -> None:
    manifest = load_manifest(referring)
    assert {Path(reference.path).parent for reference in manifest.references.values()} == {fp32_checkpoint.resolve()}
    assert size(referring) < size(copied) / 3
    weights = {weight.name: weight for weight in manifest.graphs["decoder"].weights}
    assert weights["layers.0.mlp.up_proj.weight"].file in manifest.references
    assert weights["layers.0.linear_attn.A_log.decay"].file == "model.weights"
    assert manifest.references.keys() <= manifest.files.keys()


def test_it_computes_the_same(referring: Path, copied: Path) -> None:
    np.testing.assert_array_equal(logits(referring), logits(copied))
    np.testing.assert_array_equal(logits(referring, repack=True), logits(copied, repack=True))


def test_a_checkpoint_in_another_type_is_copied(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """BF16 is not what a CPU graph reads everywhere; what is stored as F32 can stay."""
    bundle, whole = build(tiny_checkpoint, tmp_path / "bundle", weights="reference"), build(tiny_checkpoint, tmp_path / "whole")
    np.testing.assert_array_equal(logits(bundle), logits(whole))


@pytest.mark.parametrize("damage", ["gone", "touched", "shorter"])
def test_a_checkpoint_that_is_not_what_it_was(fp32_checkpoint: Path, tmp_path: Path, damage: str) -> None:
    checkpoint = Path(shutil.copytree(fp32_checkpoint, tmp_path / "checkpoint"))
    bundle = build(checkpoint, tmp_path / "bundle", weights="reference")
    load(bundle)
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    if damage == "gone":
        shard.unlink()
    elif damage == "touched":
        os.utime(shard)
    else:
        os.truncate(shard, shard.stat().st_size - 1)
    for attempt in (lambda: load(bundle), lambda: package(bundle, tmp_path / "packaged")):
        with pytest.raises(BundleError, match=rf"checkpoint file.*{shard.name}.*[Bb]uild"):
            attempt()
    assert not (tmp_path / "packaged").exists()


def test_package_makes_it_whole(fp32_checkpoint: Path, copied: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(fp32_checkpoint, tmp_path / "checkpoint"))
    bundle = build(checkpoint, tmp_path / "bundle", weights="reference")
    packaged = package(bundle, tmp_path / "packaged")
    shutil.rmtree(checkpoint)
    shutil.rmtree(bundle)
    manifest = load_manifest(packaged)
    assert not manifest.references and sorted(os.listdir(packaged)) == sorted([*manifest.files, "manifest.json", "manifest.sha256"])
    ensure_whole(packaged, manifest, again=True)
    for value in ir.load(packaged / "decoder.onnx").graph.initializers.values():
        assert not isinstance(value.const_value, ir.ExternalTensor) or Path(value.const_value.path).parent == packaged
    np.testing.assert_array_equal(logits(packaged), logits(copied))


def test_package_copies_a_whole_bundle(copied: Path, tmp_path: Path) -> None:
    packaged = package(copied, tmp_path / "packaged")
    assert {path.name: path.read_bytes() for path in packaged.iterdir()} == {path.name: path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(BuildError, match="exists already"):
        package(copied, packaged)


def test_package_does_not_copy_damage(copied: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(copied, tmp_path / "bundle"))
    with (bundle / "model.weights").open("r+b") as file:
        file.write(b"damage")
    with pytest.raises(BundleError, match="changed or damaged"):
        package(bundle, tmp_path / "packaged")
    assert not (tmp_path / "packaged").exists()
