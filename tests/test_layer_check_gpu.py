"""Bundles for a GPU, layer by layer. With -s the errors are printed: the limits of `layer_check` are made of such numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_export import build
from qwen_export.engine_options import EngineOptions
from qwen_export.verification.layer_check import verify_layers
from tests.conftest import EXAMPLES
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize

pytestmark = pytest.mark.gpu

CARRIED: dict[str, Any] = {"target": "tensorrt-rtx", "max_context": 192, "engine": EngineOptions(carry_onnx=True)}
WAYS: dict[str, dict[str, Any]] = {
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "int4": {"precision": "int4"},
    "tensorrt-rtx-fp16": {"precision": "fp16", **CARRIED},
    "tensorrt-rtx-bf16": {"precision": "bf16", **CARRIED},
    "tensorrt-rtx-fp32": {"precision": "fp32", **CARRIED},
}
CHECKPOINTS = {
    "demo-dense": lambda path: EXAMPLES / "demo-dense",
    "demo-moe": lambda path: EXAMPLES / "demo-moe",
    "wide-heads": lambda path: synthesize(tiny_config(linear_key_head_dim=128, linear_value_head_dim=128), path),
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_a_bundle_passes(name: str, way: str, tmp_path: Path) -> None:
    pytest.importorskip("polygraphy")
    if way.startswith("tensorrt"):
        pytest.importorskip("tensorrt_rtx_bindings")
    checkpoint = CHECKPOINTS[name](tmp_path / "checkpoint")
    result = verify_layers(build(checkpoint, tmp_path / "bundle", device="cuda", **WAYS[way]), checkpoint)
    for row in result["layers"]:
        print(f"{name:12} {way:20} {row['name']:14} {row['tokens']:3} {row['error']} {row['drift']} {row['passed']} {row['note']}")
    assert result["passed"], result["first"]
