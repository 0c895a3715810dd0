"""Bundles whose codes a text chooses: verified, the same every time, and what is refused."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.bundles.inspection import inspect_checkpoint
from qwen_export.errors import ParameterError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.manifest import CALIBRATION, WEIGHTS, load_manifest
from qwen_export.plugins.native.native_library import find_library
from qwen_export.verification.logit_check import verify
from tests.support.family import tiny_config
from tests.support.quantizers import gptq, quantize_checkpoint
from tests.support.synthesize import synthesize
from tests.support.tiny_tokenizer import write_tiny_tokenizer

needs_plugin = pytest.mark.skipif(find_library("cpu") is None, reason="plugins/native/cpu/build.sh was not run")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices as small as these are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 900 tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    letters = np.random.default_rng(0).choice(list(string.ascii_letters + string.digits + "  .,;()=\n"), 1200)
    path.write_text("".join(letters), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def bundle(dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(dense, tmp_path_factory.mktemp("bundle") / "int4", precision="int4", calibrate=text, max_context=128)


def checkpoint(directory: Path, *, moe: bool = False, **stored: bool) -> Path:
    # All experts for every token: else the rounding of inputs to 8 bits changes which ones a token gets, which is not what is tested here.
    config = tiny_config(vision=False, moe=moe, **({"num_experts_per_tok": 8} if moe else {}))
    return synthesize(config, directory / "checkpoint", tokenizer=write_tiny_tokenizer(directory / "tokenizer"), **stored)  # type: ignore[arg-type]


@needs_plugin
def test_a_calibrated_bundle_is_verified_and_says_by_which_text(bundle: Path, dense: Path) -> None:
    assert verify(bundle, dense)["passed"]
    manifest = load_manifest(bundle)
    facts = json.loads((bundle / CALIBRATION).read_text())
    assert manifest.precision_plan["mlp"] == "int4 block 32 gptq"
    assert facts["sha256"] in manifest.precision_plan["calibration"]
    assert any(name.startswith("mtp.") for name in facts["rows"])


@needs_plugin
def test_the_same_text_gives_the_same_bundle_also_after_an_interrupt(bundle: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def interrupt(name: str, done: int, total: int) -> None:
        seen.append(name)
        if "layer 3" in name:
            raise KeyboardInterrupt

    options = {"precision": "int4", "calibrate": text, "max_context": 128}
    with pytest.raises(KeyboardInterrupt):
        build(dense, tmp_path / "again", report=interrupt, **options)  # type: ignore[arg-type]
    seen.clear()
    build(dense, tmp_path / "again", report=lambda name, done, total: seen.append(name), **options)  # type: ignore[arg-type]
    assert not any("layer 2 " in name for name in seen)
    assert any("layer 3 " in name for name in seen)
    first, second = load_manifest(bundle), load_manifest(tmp_path / "again")
    assert first.files[WEIGHTS] == second.files[WEIGHTS]
    assert first.files[CALIBRATION] == second.files[CALIBRATION]


@needs_plugin
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "per-expert"])
def test_experts_are_calibrated_however_they_are_stored(fused: bool, text: Path, tmp_path: Path) -> None:
    source = checkpoint(tmp_path, moe=True, fused_experts=fused)
    bundle = build(source, tmp_path / "bundle", precision="int4", calibrate=text, max_context=128)
    assert verify(bundle, source)["passed"]
    assert any(".experts." in name for name in json.loads((bundle / CALIBRATION).read_text())["rows"])


@needs_plugin
def test_what_the_checkpoint_stores_as_integers_stays(tmp_path: Path, text: Path, dense: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    made = quantize_checkpoint(dense, tmp_path / "made", gptq(32), config)
    plan = plan_build(open_checkpoint(made.path), precision="int4", calibrate=text)
    assert plan.quantization is not None
    assert plan.calibration is not None
    assert plan.quantization.kept
    assert not plan.quantization.kept.keys() & plan.calibration.matrices.keys()


def test_what_cannot_be_calibrated_is_refused_before_any_work(dense: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="not fp32"):
        plan_build(open_checkpoint(dense), precision="fp32", calibrate=text)
    with pytest.raises(UnsupportedError, match="verify"):
        plan_build(open_checkpoint(dense), "onnx", precision="int4", calibrate=text)
    with pytest.raises(ParameterError, match="no such calibration text"):
        plan_build(open_checkpoint(dense), precision="int4", calibrate=tmp_path / "missing.txt")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ParameterError, match="too short"):
        build(dense, tmp_path / "bundle", precision="int4", calibrate=tmp_path / "short.txt")
    (tmp_path / "plan.toml").write_text('[mlp]\nmethod = "gptq"\n')
    with pytest.raises(UnsupportedError, match="needs a text"):
        plan_build(open_checkpoint(dense), precision="int4", plan_file=tmp_path / "plan.toml")


@needs_plugin
def test_inspect_says_what_a_calibration_would_do(dense: Path) -> None:
    report = inspect_checkpoint(dense, targets=["onnxruntime"], calibrate="built-in")
    entry = next(entry for entry in report["targets"] if (entry["device"], entry["precision"]) == ("cpu", "int4"))
    assert "matrices" in entry["calibration"]
    assert "built-in" in entry["calibration"]
