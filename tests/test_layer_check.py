"""`verify --per-layer`: every target names its layers, the first layer that is off is named, and so is the one that leaves fp16."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.lower_graphs import lower
from qwen_export.commands.cli import main
from qwen_export.errors import VerifyError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.layer_points import EMBEDDING, OUTPUT, POINTS, point_name
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.graphs.models.observed_layers import observe
from qwen_export.manifest import hash_file, load_manifest, write_manifest
from qwen_export.plugins.native.native_library import LIBRARIES
from qwen_export.plugins.onnxruntime.chain_steps import expand_chains
from qwen_export.runtimes.decoding.static_graphs import PROMPT, STEP
from qwen_export.verification.layer_check import verify_layers
from qwen_export.verification.layer_comparison import compare
from tests.support.family import tiny_config
from tests.support.safetensors_files import overwrite_tensor, split_file
from tests.support.synthesize import synthesize
from tests.support.tensorrt_graphs import bundle_on_cpu
from tests.test_parity import tiny

pytest.importorskip("polygraphy")

LAYERS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tiny(), tmp_path_factory.mktemp("layers") / "checkpoint")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tiny(moe=True), tmp_path_factory.mktemp("mixture") / "checkpoint")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkpoint, tmp_path_factory.mktemp("layers") / "bundle")


@pytest.fixture
def damaged(bundle: Path, tmp_path: Path) -> Callable[[str, float], Path]:
    """A copy of the bundle with one weight multiplied, and a manifest that takes the file as it is."""

    def damage(name: str, factor: float) -> Path:
        copy = Path(shutil.copytree(bundle, tmp_path / "damaged"))
        manifest = load_manifest(copy)
        weight = next(w for w in manifest.graphs["decoder"].weights if name in w.name)
        with (copy / weight.file).open("r+b") as file:
            count = int(np.prod(weight.shape))
            file.seek(weight.offset)
            if weight.dtype == "bfloat16":
                data = as_bf16(as_float(file.read(2 * count)) * np.float32(factor))
            else:
                data = (np.frombuffer(file.read(4 * count), np.float32) * np.float32(factor)).tobytes()
            file.seek(weight.offset)
            file.write(data)
        rehash(copy, weight.file)
        return copy

    return damage


def rehash(bundle: Path, *files: str) -> None:
    manifest = load_manifest(bundle)
    changed = dataclasses.replace(manifest, files={**manifest.files, **{name: hash_file(bundle / name) for name in files}})
    write_manifest(bundle, changed)


def as_float(data: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


def as_bf16(values: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def scaled(checkpoint: Path, output: Path, factors: dict[str, float]) -> Path:
    """A copy of a BF16 checkpoint with tensors multiplied."""
    shutil.copytree(checkpoint, output)
    for path in output.glob("*.safetensors"):
        header, content = split_file(path)
        for name, factor in factors.items():
            for stored in (key for key in header if key.endswith(name) and "mtp" not in key):
                assert header[stored]["dtype"] == "BF16"
                begin, end = header[stored]["data_offsets"]
                overwrite_tensor(output, stored, as_bf16(as_float(content[begin:end]) * factor))
    return output


def names(model: ir.Model) -> dict[str, ir.Value]:
    expand_chains(model.graph)
    return {value.name or "": value for node in model.graph for value in node.outputs}


def errors(result: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["error"] for row in result["layers"]}


# ---- names

TARGETS = [
    ("onnxruntime", "cpu", "fp32"),
    ("onnxruntime", "cpu", "int4"),
    ("onnxruntime", "cuda", "fp16"),
    ("onnxruntime", "cuda", "int8"),
    ("onnx", "cpu", "fp16"),
    ("directml", "dml", "fp16"),
    ("tensorrt-rtx", "cuda", "bf16"),
]


@pytest.mark.parametrize("plugin", [True, False], ids=["plugin", "plain"])
@pytest.mark.parametrize(("target", "device", "precision"), TARGETS)
def test_every_target_keeps_the_names_of_the_points(
    target: str, device: str, precision: str, plugin: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not plugin and (target != "onnxruntime" or precision in ("int4", "int8")):
        pytest.skip("the target has no plugin, or the precision needs it")
    (tmp_path / "library").touch()  # lowering asks only whether it is there
    for library in LIBRARIES.values():
        monkeypatch.setenv(library.variable, str(tmp_path / "library") if plugin else "")
    source = open_checkpoint(checkpoint)
    models = lower(source, plan_build(source, target, device, precision, max_context=128, mtp=False, vision=False))
    there = names(models[STEP])
    for layer in range(LAYERS):
        for point in POINTS:
            assert point_name(layer, point) in there, (target, layer, point)
    assert EMBEDDING in there
    if PROMPT in models:  # without logits, what follows the last layer's state is not computed
        assert point_name(LAYERS - 2, OUTPUT) in names(models[PROMPT])


def test_the_names_where_the_cuda_plugin_takes_whole_mixers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "library").touch()
    monkeypatch.setenv(LIBRARIES["cuda"].variable, str(tmp_path / "library"))
    config = tiny_config(vision=False, linear_key_head_dim=128, linear_value_head_dim=128)
    source = open_checkpoint(synthesize(config, tmp_path / "wide"))
    model = lower(source, plan_build(source, "onnxruntime", "cuda", "bf16"))[STEP]
    assert {point_name(0, point) for point in POINTS} <= names(model).keys()
    assert "DeltaNet" in {node.op_type for node in model.graph}


def test_the_names_in_a_mixture_too(mixture: Path) -> None:
    source = open_checkpoint(mixture)
    for target, device, precision in (("onnxruntime", "cpu", "int8"), ("tensorrt-rtx", "cuda", "fp16")):
        there = names(lower(source, plan_build(source, target, device, precision, max_context=128))[STEP])
        assert {point_name(LAYERS - 1, point) for point in POINTS} <= there.keys()


# ---- bundles that are right


def test_a_bundle_passes(bundle: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in bundle.iterdir())
    main(["verify", str(bundle), "--reference", str(checkpoint), "--per-layer", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] and result["first"] == "" and result["warnings"] == []
    text = [row for row in result["layers"] if row["kind"] != "vision"]
    assert [row["name"] for row in text] == ["embedding", *(f"layer {i}" for i in range(LAYERS)), "norm and head"]
    assert [row["kind"] for row in text[1:-1]] == ["linear_attention"] * 3 + ["full_attention"]
    for row in text[1:-1]:
        assert row["tokens"] == 81 and 0 < row["error"] < 2e-6 and row["drift"] < 1e-5 and 0 < row["fp16_share"] < 1e-2
    assert sorted(path.name for path in bundle.iterdir()) == before and not load_manifest(bundle).verification


def test_a_mixture_passes(mixture: Path, tmp_path: Path) -> None:
    result = verify_layers(build(mixture, tmp_path / "bundle"), mixture)
    assert result["passed"] and max(errors(result).values()) < 2e-6


@pytest.mark.parametrize(("precision", "mtp"), [("fp32", True), ("fp16", False)])
def test_graphs_of_fixed_shapes_pass(precision: str, mtp: bool, checkpoint: Path, tmp_path: Path) -> None:
    result = verify_layers(build(checkpoint, tmp_path / "b", target="onnx", precision=precision, max_context=128, mtp=mtp), checkpoint)
    assert result["passed"]
    tokens = {row["name"]: row["tokens"] for row in result["layers"]}
    # Nobody reads what the last layer makes of a prompt, but a draft head: it is compared for the steps only.
    assert tokens["layer 2"] == 81 and tokens["layer 3"] == (81 if mtp else 1 + 4 + 1)


def test_graphs_for_tensorrt_pass(checkpoint: Path, tmp_path: Path) -> None:
    """The graphs that TensorRT compiles, by ONNX Runtime."""
    assert verify_layers(bundle_on_cpu(checkpoint, tmp_path / "b", "fp32", max_context=128), checkpoint)["passed"]


def test_quantized_weights_are_compared_with_what_they_stand_for(checkpoint: Path, tmp_path: Path) -> None:
    result = verify_layers(build(checkpoint, tmp_path / "b", precision="int4"), checkpoint)
    assert result["passed"] and errors(result)["layer 1"] > 1e-4


# ---- bundles that are not

DAMAGE = [
    ("embed_tokens.weight", "embedding", "embedding"),
    ("layers.1.linear_attn.out_proj", "layer 1", "mixed"),
    ("layers.2.mlp.down_proj", "layer 2", "output"),
    ("layers.2.mlp.gate_up_proj", "layer 2", "product"),
    ("layers.3.self_attn.o_proj", "layer 3", "mixed"),
    ("lm_head", "norm and head", ""),
]


@pytest.mark.parametrize(("weight", "first", "origin"), DAMAGE)
def test_the_first_layer_that_is_off_is_named(
    weight: str,
    first: str,
    origin: str,
    damaged: Callable[[str, float], Path],
    bundle: Path,
    checkpoint: Path,
) -> None:
    if not any(weight in w.name for w in load_manifest(bundle).graphs["decoder"].weights):
        pytest.skip("this way of lowering has no such weight")
    result = verify_layers(damaged(weight, 1.01), checkpoint)
    assert not result["passed"] and result["first"] == first
    wrong = [row for row in result["layers"] if row["passed"] is False]
    assert [row["name"] for row in wrong] == [first], "what follows starts from the same values, so it is right"
    assert wrong[0]["origin"] == origin


def test_the_command_names_it_and_exits_with_1(
    damaged: Callable[[str, float], Path], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(damaged("layers.2.mlp.down_proj", 1.01)), "--reference", str(checkpoint), "--per-layer"])
    output = capsys.readouterr()
    assert stop.value.code == 1
    assert "the bundle differs from its checkpoint (layer 2, output): got an error of" in output.err
    (line,) = (line for line in output.out.splitlines() if line.startswith("layer 2"))
    assert "linear" in line and "FAIL, from output on" in line


@pytest.mark.parametrize(("factor", "passes"), [(80.0, True), (400.0, False)])
def test_what_leaves_fp16_is_named(factor: float, passes: bool, checkpoint: Path, tmp_path: Path) -> None:
    parts = {f"layers.1.mlp.{part}_proj.weight": factor for part in ("gate", "up")}
    loud = scaled(checkpoint, tmp_path / "loud", parts)
    result = verify_layers(build(loud, tmp_path / "b", target="onnx", precision="fp16", max_context=128), loud)
    assert result["passed"] is passes and result["first"] == ("" if passes else "layer 1")
    assert result["warnings"][0].startswith("layer 1: the product in its MLP reaches")
    assert ("overflows" in result["warnings"][0]) is not passes
    if not passes:
        row = result["layers"][2]
        assert row["origin"] == "product" and row["note"] == "values are not finite" and row["fp16_share"] > 1


def test_wide_values_are_no_matter_to_fp32(checkpoint: Path, tmp_path: Path) -> None:
    loud = scaled(checkpoint, tmp_path / "loud", {f"layers.1.mlp.{part}_proj.weight": 400.0 for part in ("gate", "up")})
    result = verify_layers(build(loud, tmp_path / "b"), loud)
    assert result["passed"] and result["warnings"] == [] and result["layers"][2]["fp16_share"] > 1


# ---- refusals


def test_a_bundle_without_names_is_told(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(bundle, tmp_path / "old"))
    model = onnx.load(old / "decoder.onnx", load_external_data=False)
    for node in model.graph.node:
        for values in (node.input, node.output):
            for i, name in enumerate(values):
                values[i] = name.replace(".output", ".add")
    onnx.save(model, old / "decoder.onnx")
    rehash(old, "decoder.onnx")
    with pytest.raises(VerifyError, match="do not name where their layers end"):
        verify_layers(old, checkpoint)


def test_another_checkpoint_is_told(bundle: Path, demo_checkpoint: Path) -> None:
    with pytest.raises(VerifyError, match="not the checkpoint that the bundle was built from"):
        verify_layers(bundle, demo_checkpoint)


def test_how_near_a_router_is_to_deciding_otherwise_is_seen(mixture: Path) -> None:
    source = open_checkpoint(mixture)
    ids = list(range(40))
    gaps = observe(load_decoder(source), ids).routing_gap
    assert gaps.keys() == set(range(LAYERS)) and all(gap.shape == (40,) and (gap >= 0).all() and gap.max() > 1e-2 for gap in gaps.values())


def test_a_token_with_large_values_hides_no_other() -> None:
    wanted = np.ones((4, 8), np.float32)
    wanted[0] *= 1e4
    got = wanted.copy()
    got[2] *= 1.1
    (found,) = compare({"x": got}, {"x": wanted}, {"x": 1e-2}).values()
    assert not found.passed and found.share == pytest.approx(0.05, rel=1e-4) and found.max_abs == pytest.approx(0.1, rel=1e-3)
