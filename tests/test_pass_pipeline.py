"""Passes explain themselves: why each stands where it does, what it left and why; one that must match and does not fails."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import onnx_ir as ir
import pytest

from qwen_export.building.pass_pipeline import REASONS, run_passes
from qwen_export.errors import CaptureError
from qwen_export.graphs.capture import capture_decoder
from qwen_export.graphs.config import TextConfig, parse_config
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.plugins.onnxruntime.onnxruntime_choices import choose
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_kernels import installed
from qwen_export.targets import ONNXRUNTIME, TARGETS
from tests.support.family import tiny_config


@pytest.fixture(scope="module")
def config() -> TextConfig:
    return parse_config(tiny_config()).text


@pytest.fixture(scope="module")
def captured(config: TextConfig) -> ir.Model:
    return capture_decoder(config, "fp32")


def lower(model: ir.Model, config: TextConfig, left_out: str = "", dump: Path | None = None) -> None:
    """Without the plugin; without the pass `left_out`."""
    choices, _ = choose(installed("cpu"), "fp32", config)
    passes = tuple(step for step in ONNXRUNTIME.passes if step.name != left_out)
    run_passes(model, dataclasses.replace(ONNXRUNTIME, passes=passes), PassContext(config, "fp32", choices), dump)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_pass_exists_and_says_why_it_stands_there(target: object) -> None:
    for step in target.passes:  # type: ignore[attr-defined]
        module, _, name = step.function.partition(":")
        assert callable(getattr(importlib.import_module(f"qwen_export.{module}"), name))
        assert len(step.why) > 20, step.name


def test_the_report_has_place_reason_and_what_was_left(captured: ir.Model, config: TextConfig, tmp_path: Path) -> None:
    lower(captured.clone(), config, dump=tmp_path)
    report = (tmp_path / REASONS).read_text().splitlines()
    for number, step in enumerate(ONNXRUNTIME.passes, 1):
        assert f"{number:02d} {step.name}: {step.why}" in report
    at = report.index(next(line for line in report if line.startswith("10 absorb_norm")))
    assert report[at + 1] == "     nothing to do: products are lowered to fused_matmul, which takes no norm"
    # The first norm reads the embedding, so no addition is there to fuse it with.
    at = report.index(next(line for line in report if line.startswith("12 fuse_residual_norm")))
    assert report[at + 1] == "     changed 8"
    assert report[at + 2].endswith("its input is made by Gather, not by an addition")
    assert "qwen.rms_norm -> " in report[at + 2]


def test_a_pass_that_must_match_and_does_not_is_an_error(captured: ir.Model, config: TextConfig, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"a pass left a candidate .*recognize_linear.*MatMul -> .*its weight is not read as x w\^T"):
        model = captured.clone()
        product = next(node for node in model.graph if node.op_type == "MatMul")
        turned = product.inputs[1]
        assert turned is not None
        product.replace_input_with(1, turned.producer().inputs[0])  # type: ignore[union-attr]
        lower(model, config, dump=tmp_path)
    assert "its weight is not read as x w^T" in (tmp_path / REASONS).read_text()
    with pytest.raises(CaptureError, match=r"changed nothing \(fuse_silu\).*expected x \* sigmoid\(x\)"):
        model = captured.clone()
        for node in model.graph:
            if node.op_type == "Sigmoid":
                node.op_type = "Tanh"
        lower(model, config)


def test_an_op_that_no_pass_lowers_is_an_error(captured: ir.Model, config: TextConfig) -> None:
    with pytest.raises(CaptureError, match=r"lowered by no pass .*got qwen\.gated_(delta_net|attention)"):
        lower(captured.clone(), config, left_out="lower_mixers")
