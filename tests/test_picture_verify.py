"""`verify` sees the tower: a bundle whose tower is another one fails, and the check that fails is named."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
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


@pytest.mark.parametrize("plugin", [False, True])
def test_a_tower_for_cuda(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: bool) -> None:
    """With the plugin five products and four kernels a block; without it on ONNX Runtime's attention, which keeps no scores, and a width
    that the native products do not take is left to FusedMatMul."""
    library = tmp_path / "plugin.so"
    library.write_bytes(b"")
    monkeypatch.setenv("QWEN_EXPORT_CUDA_PLUGIN", str(library) if plugin else "")
    bundle = build(tiny_checkpoint, tmp_path / "bundle", device="cuda", precision="fp16", mtp=False)
    graph = onnx.load(bundle / load_manifest(bundle).graphs["vision"].file, load_external_data=False).graph
    count = Counter(node.op_type for node in graph.node)
    if plugin:
        depth = count["PictureAttention"]
        assert depth > 0 and (count["BiasGelu"], count["ResidualNorm"]) == (depth, 2 * depth)
        # The first norm has no product before it, and the merger's GELU is the exact one.
        assert (count["LayerNormalization"], count["Gelu"]) == (1, 1)
    else:
        assert {"MultiHeadAttention", "RotaryEmbedding", "LayerNormalization", "Gelu"} <= set(count)
    assert not [node for node in graph.node if node.domain == "qwen"]
    assert {value.type.tensor_type.elem_type for value in graph.output} == {onnx.TensorProto.FLOAT16}


def test_a_tower_in_eight_bits(tmp_path: Path) -> None:
    """Where the plan says so. Products whose inputs are no whole blocks, as 4304 values are not, stay as they are stored."""
    config = tiny_config(linear_key_head_dim=32, linear_value_head_dim=32)
    config["vision_config"] |= {"hidden_size": 128, "num_heads": 4, "intermediate_size": 272}
    checkpoint = synthesize(config, tmp_path / "checkpoint")
    (tmp_path / "plan.toml").write_text('[vision]\nformat = "int8"\n')
    bundle = build(checkpoint, tmp_path / "bundle", precision="int8", plan_file=tmp_path / "plan.toml")
    manifest = load_manifest(bundle)
    assert manifest.precision_plan["vision"].startswith("int8")
    assert any(weight.name.startswith("visual") and "int8" in weight.name for weight in manifest.graphs["vision"].weights)
    assert not failed(bundle, checkpoint)
    assert verify_layers(bundle, checkpoint)["passed"]
