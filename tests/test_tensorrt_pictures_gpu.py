"""Pictures on TensorRT-RTX on a GPU: the tower in a few sizes, and features in all graphs of the decoder, next to the eager modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_export import build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.verification.logit_check import verify
from tests.support.synthesize import synthesize
from tests.test_parity import tiny

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_verify_covers_the_tower(precision: str, tmp_path: Path) -> None:
    """Two pictures that are filled up, and a prompt with both that is read in parts."""
    checkpoint, options = synthesize(tiny(), tmp_path / "checkpoint"), StaticOptions(64, step_tokens=4, picture_tokens=(8, 64))
    bundle = build(
        checkpoint,
        tmp_path / "bundle",
        target="tensorrt-rtx",
        device="cuda",
        precision=precision,
        max_context=192,
        vision=True,
        options=options,
    )
    report = verify(bundle, checkpoint)
    assert report["passed"], report
    assert sum(check["name"] in ("vision tower", "pictures") for check in report["checks"]) == 3
