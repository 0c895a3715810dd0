"""`verify` sees the tower: a bundle whose tower is another one fails, and the check that fails is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.errors import UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.manifest import hash_file, load_manifest, write_manifest
from qwen_export.verification.layer_check import verify_layers
from qwen_export.verification.logit_check import verify
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize


def failed(bundle: Path, checkpoint: Path) -> set[str]:
    return {check["name"] for check in verify(bundle, checkpoint)["checks"] if not check["passed"]}


@pytest.mark.parametrize("weight", ["visual.blocks.1.norm1.bias", "visual.merger.linear_fc2.bias"])
def test_a_changed_weight_of_the_tower_is_found(tmp_path: Path, weight: str) -> None:
    checkpoint = synthesize(tiny_config(linear_key_head_dim=32, linear_value_head_dim=32), tmp_path / "checkpoint")
    bundle = build(checkpoint, tmp_path / "bundle")
    assert not failed(bundle, checkpoint)
    manifest = load_manifest(bundle)
    place = next(w for w in manifest.graphs["vision"].weights if w.name == weight)
    with (bundle / place.file).open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\0\0\x80\x3f")  # 1.0
    manifest.files[place.file] = hash_file(bundle / place.file)
    write_manifest(bundle, manifest)
    assert failed(bundle, checkpoint) == {"vision tower", "pictures"}
    result = verify_layers(bundle, checkpoint)
    assert result["first"] == ("vision 1" if "blocks" in weight else "vision merger")


def test_every_block_of_the_tower_is_compared(tmp_path: Path) -> None:
    config = tiny_config(linear_key_head_dim=32, linear_value_head_dim=32)
    checkpoint = synthesize(config, tmp_path / "checkpoint")
    result = verify_layers(build(checkpoint, tmp_path / "bundle"), checkpoint)
    rows = [row for row in result["layers"] if row["kind"] == "vision"]
    assert [row["name"] for row in rows] == [f"vision {i}" for i in range(config["vision_config"]["depth"])] + ["vision merger"]
    for row in rows:
        assert row["passed"] and row["tokens"] and row["error"] <= 1e-6 and row["drift"] <= 1e-5 and 0 < row["fp16_share"] < 0.01


def test_tokens_of_pictures_outside_the_vocabulary(tmp_path: Path) -> None:
    """Such a checkpoint reads text; pictures are refused before any work where they are asked for."""
    config = tiny_config(vocab_size=64)
    config["image_token_id"] = 64
    checkpoint = open_checkpoint(synthesize(config, tmp_path / "checkpoint"))
    plan = plan_build(checkpoint)
    assert plan.vision.spec is None
    assert any("vocabulary" in note for note in plan.notes)
    with pytest.raises(UnsupportedError, match="vocabulary"):
        plan_build(checkpoint, vision=True)
