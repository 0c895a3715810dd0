"""FP8 weights with a scale per block: codes of the block FP8 releases are kept bit for bit, others are made; what CUDA's graphs have of
them, and who refuses them. The kernels are in test_fp8_gpu.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_export.building.build_plan import BuildPlan, default_precision, plan_build
from qwen_export.building.compiler import build
from qwen_export.building.lower_graphs import lower
from qwen_export.bundles.inspection import inspect_checkpoint
from qwen_export.errors import CheckpointError, ConfigError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.e4m3 import E4M3_VALUES, to_e4m3
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.graphs.quantization.fp8_blocks import block_codes, block_scales, block_values
from qwen_export.manifest import load_manifest
from qwen_export.plugins.native.native_library import LIBRARIES
from qwen_export.plugins.onnxruntime.chain_steps import expand_chains
from qwen_export.verification.logit_check import reference_plan
from tests.support import quantizers
from tests.support.family import tiny_config
from tests.support.packed_matrices import stored_bytes
from tests.support.quantizers import QuantizedCheckpoint, quantize_checkpoint
from tests.support.synthesize import synthesize
from tests.support.tiny_tokenizer import write_tiny_tokenizer

RELEASE = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
SIZES = {"hidden_size": 256, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
Bytes = npt.NDArray[np.uint8]

pytestmark = pytest.mark.usefixtures("fake_library")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths that are no multiples of 128 are among them."""
    config = tiny_config(intermediate_size=336, vision=False, **SIZES)
    directory = tmp_path_factory.mktemp("source")
    return synthesize(config, directory / "checkpoint", tokenizer=write_tiny_tokenizer(directory / "tokenizer"))


@pytest.fixture(scope="module")
def release(source: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return quantize_checkpoint(source, tmp_path_factory.mktemp("release"), quantizers.block_fp8(), RELEASE)


@pytest.fixture(scope="module")
def bundles(release: QuantizedCheckpoint, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """Of the release and of the checkpoint that it was made of, by their paths."""
    directory, library = tmp_path_factory.mktemp("bundles"), LIBRARIES["cuda"]
    (directory / library.file).write_bytes(b"kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.variable, str(directory / library.file))
        options: dict[str, Any] = {"device": "cuda", "precision": "fp8", "max_context": 64, "draft_vocab": 256}
        return {path: build(path, directory / name, **options) for path, name in ((release.path, "kept"), (source, "made"))}


@pytest.fixture
def plan_toml(tmp_path: Path) -> Path:
    return tmp_path / "plan.toml"


def plan_of(path: Path, precision: str = "fp8", device: str = "cuda", **options: Any) -> BuildPlan:
    return plan_build(open_checkpoint(path), device=device, precision=precision, **options)


def outcome(plan: BuildPlan) -> Counter[str]:
    assert plan.quantization is not None
    return sum((Counter(counts) for counts in plan.quantization.outcome.values()), Counter())


def bits(made: QuantizedCheckpoint, *modules: str) -> Bytes:
    """The codes of some modules of the release, one on top of the other."""
    return np.concatenate([made.stored[f"model.{module}.weight"].view(torch.uint8).numpy() for module in modules])


def scales(made: QuantizedCheckpoint, *modules: str) -> npt.NDArray[np.float32]:
    return np.concatenate([made.stored[f"model.{module}.weight_scale_inv"].float().numpy() for module in modules])


# ---- numbers ----


def test_codes_are_those_of_the_format() -> None:
    finite = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    np.testing.assert_array_equal(to_e4m3(E4M3_VALUES[finite]), finite)
    neighbors = np.sort(E4M3_VALUES[:0x7F])
    ties = np.concatenate([(neighbors[1:] + neighbors[:-1]) / 2, -(neighbors[1:] + neighbors[:-1]) / 2])
    random = np.random.default_rng(0).normal(size=5000) * 10.0 ** np.random.default_rng(1).uniform(-4, 2, 5000)
    for values in (ties, np.clip(random, -448, 448), np.array([448.00003, -448.00003, 1e-30, 0.0])):
        wide = values.astype(np.float32)
        np.testing.assert_array_equal(
            to_e4m3(wide), torch.from_numpy(wide).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        )


@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (3, 8)])
def test_blocks_are_made_as_the_releases_make_them(shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    stored, wanted = quantizers.block_fp8(torch.float32)("m", values)
    made = block_scales(values.numpy())
    codes = block_codes(values.numpy(), made)
    np.testing.assert_array_equal(made, stored["m.weight_scale_inv"].numpy())
    np.testing.assert_array_equal(codes, stored["m.weight"].view(torch.uint8).numpy())
    np.testing.assert_array_equal(block_values(codes, np.repeat(made, 128, axis=0)[: shape[0]]), wanted.numpy())
    zeros = np.zeros(shape, np.float32)
    np.testing.assert_array_equal(block_scales(zeros), 1)


# ---- what the file of weights has ----


def test_the_codes_of_a_release_are_in_the_bundle_bit_for_bit(release: QuantizedCheckpoint, bundles: dict[Path, Path]) -> None:
    assert outcome(plan_of(release.path)) == {"kept: fp8 128x128": 32}
    bundle = bundles[release.path]
    codes, numbers = stored_bytes(bundle), stored_bytes(bundle, kind=onnx.TensorProto.FLOAT)
    for name, modules in {
        "layers.0.linear_attn.in_proj": ["layers.0.linear_attn.in_proj_qkv", "layers.0.linear_attn.in_proj_z"],
        "layers.0.linear_attn.out_proj.weight": ["layers.0.linear_attn.out_proj"],
        "layers.2.mlp.down_proj.weight": ["layers.2.mlp.down_proj"],
        "layers.3.self_attn.o_proj.weight": ["layers.3.self_attn.o_proj"],
    }.items():
        np.testing.assert_array_equal(codes[f"{name}.fp8"], bits(release, *modules))
        stored = scales(release, *modules)
        np.testing.assert_array_equal(numbers[f"{name}.fp8.scales"][:, : stored.shape[1]], stored)
        assert numbers[f"{name}.fp8.scales"].shape[1] == 4 and not numbers[f"{name}.fp8.scales"][:, stored.shape[1] :].any()
    # gate and up have 336 rows each, so that blocks of up begin inside blocks of the stack: 16 rows share a scale.
    gate, up = "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"
    np.testing.assert_array_equal(codes["layers.1.mlp.gate_up_proj.weight.fp8"], bits(release, gate, up))
    wanted = np.concatenate([np.repeat(scales(release, module), 8, axis=0)[:21] for module in (gate, up)])
    np.testing.assert_array_equal(numbers["layers.1.mlp.gate_up_proj.weight.fp8.scales"][:, :2], wanted)
    # The heads of q_proj are cut into queries and gates: rows are in another order, their codes are the same.
    assert sorted(codes["layers.3.self_attn.in_proj.fp8"].tolist()) == sorted(
        bits(release, *(f"layers.3.self_attn.{part}_proj" for part in "qkv")).tolist()
    )
    entries = load_manifest(bundle).precision_plan
    assert entries["mlp"] == "fp8 128x128" and entries["mlp stored quantized"] == "12 kept: fp8 128x128"


def test_a_reference_has_the_values_of_the_codes(bundles: dict[Path, Path]) -> None:
    """What `verify` compares with: of kept codes what they stand for, of others what the bundle's codes stand for."""
    for path, bundle in bundles.items():
        checkpoint, manifest = open_checkpoint(path), load_manifest(bundle)
        model = load_decoder(checkpoint, reference_plan(checkpoint, manifest, bundle))
        codes, numbers = stored_bytes(bundle), stored_bytes(bundle, kind=onnx.TensorProto.FLOAT)
        for name, rows in (("layers.0.mlp.down_proj.weight", 128), ("layers.1.mlp.gate_up_proj.weight", 16), ("lm_head.weight", 128)):
            stored = numbers[f"{name}.fp8.scales"]
            found = codes[f"{name}.fp8"]
            values = block_values(found, np.repeat(stored, rows, axis=0)[: len(found), : -(-found.shape[1] // 128)])
            parts = [name.replace("gate_up", half) for half in ("gate", "up")] if "gate_up" in name else [name]
            expected = np.concatenate([dict(model.named_parameters())[part].detach().numpy() for part in parts])
            np.testing.assert_array_equal(values[:, : expected.shape[1]], expected)
            exact = dict(load_decoder(checkpoint).named_parameters())[parts[0]].detach().numpy()
            assert np.abs(expected[: len(exact)] - exact).max() < 0.04 * np.abs(exact).max()


def test_experts_of_a_release(tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
    config = tiny_config(moe=True, vision=False, **SIZES, **sizes)
    plain = synthesize(config, tmp_path / "source", fused_experts=False, tokenizer=write_tiny_tokenizer(tmp_path / "tokenizer"))
    made = quantize_checkpoint(plain, tmp_path / "made", quantizers.block_fp8(), RELEASE)
    assert outcome(plan_of(made.path, mtp=False))["kept: fp8 128x128"] == 4 * 4 * 3 + 13 + 12
    bundle = build(made.path, tmp_path / "bundle", device="cuda", precision="fp8", max_context=64, mtp=False)
    codes, numbers = stored_bytes(bundle), stored_bytes(bundle, kind=onnx.TensorProto.FLOAT)
    for e in range(4):
        gate, up, down = (f"layers.1.mlp.experts.{e}.{name}_proj" for name in ("gate", "up", "down"))
        np.testing.assert_array_equal(codes["layers.1.mlp.experts.gate_up_proj.fp8"][e], bits(made, gate, up))
        np.testing.assert_array_equal(codes["layers.1.mlp.experts.down_proj.fp8"][e], bits(made, down))
        np.testing.assert_array_equal(numbers["layers.1.mlp.experts.gate_up_proj.fp8.scales"][e, :, :2], scales(made, gate, up))
        np.testing.assert_array_equal(numbers["layers.1.mlp.experts.down_proj.fp8.scales"][e, :, :1], scales(made, down))
    fused = synthesize(config, tmp_path / "fused", tokenizer=write_tiny_tokenizer(tmp_path / "tokenizer2"))
    graph = lower(open_checkpoint(fused), plan_of(fused))["decoder"].graph
    (node, *_) = [node for node in graph if node.op_type == "Fp8Moe"]
    assert {key: node.attributes.get_int(key) for key in ("gate_up_rows", "down_rows")} == {"gate_up_rows": 128, "down_rows": 128}


def test_scales_of_rows_and_tensors_are_kept_too(source: Path, tmp_path: Path, plan_toml: Path) -> None:
    compressed = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
    rows = quantize_checkpoint(source, tmp_path / "rows", quantizers.scaled(torch.float8_e4m3fn, "channel"), compressed)
    assert outcome(plan_of(rows.path)) == {"kept: fp8 per channel": 32}
    graph = lower(open_checkpoint(rows.path), plan_of(rows.path))["decoder"].graph
    expand_chains(graph)
    assert {node.attributes.get_int("rows") for node in graph if node.op_type == "Fp8SwiGlu"} == {1}
    small = quantize_checkpoint(source, tmp_path / "small", quantizers.block_fp8(block=48), RELEASE | {"weight_block_size": [48, 48]})
    assert outcome(plan_of(small.path)) == {"fp8 48x48, dequantized to fp8 128x128 (blocks of 48x48)": 32}
    plan_toml.write_text("[mlp]\nkeep = false")
    assert "kept: fp8 per channel" not in plan_of(rows.path, plan_file=plan_toml).quantization.outcome["mlp"]  # type: ignore[union-attr]


# ---- graphs and plans ----


def test_the_graph_has_as_many_launches_as_with_integers(wide_heads: Path, plan_toml: Path) -> None:
    """in_proj_a and in_proj_b stay fp16, as the tail of the product beside them."""

    def counts(precision: str, **options: Any) -> Counter[str]:
        return Counter(node.op_type.removeprefix("Quant").removeprefix("Fp8") for node in graph(precision, **options))

    def graph(precision: str, **options: Any) -> Any:
        made = lower(open_checkpoint(wide_heads), plan_of(wide_heads, precision, **options))["decoder"].graph
        expand_chains(made)
        return made

    assert counts("fp8") == counts("int8")
    tails = [node.inputs[5] for node in graph("fp8") if node.op_type == "Fp8Linear" and len(node.inputs) > 5]
    assert {value.dtype.name for value in tails if value is not None} == {"FLOAT16"} and len(tails) == 3
    plan_toml.write_text('[lm_head]\nformat = "int8"\n[attention]\nformat = "stored"')
    ops = Counter(node.op_type for node in graph("fp8", plan_file=plan_toml))
    assert ops["QuantLinear"] == 1 and ops["Linear"] > 0 and ops["Fp8SwiGlu"] == 4
    plan_toml.write_text('[matrices]\n"*.up_proj" = { format = "int8" }')
    with pytest.raises(ConfigError, match="gate_proj and up_proj of a layer one format"):
        graph("fp8", plan_file=plan_toml)


def test_the_draft_head_reads_the_first_rows_of_the_head(source: Path, bundles: dict[Path, Path]) -> None:
    bundle = bundles[source]

    def places(file: str, name: str) -> dict[str, tuple[int, int]]:
        tensors = onnx.load(bundle / file, load_external_data=False).graph.initializer
        found = {t.name.removeprefix(name): {e.key: e.value for e in t.external_data} for t in tensors if t.name.startswith(name)}
        return {key: (int(place["offset"]), int(place["length"])) for key, place in found.items()}

    whole, part = places("decoder.onnx", "lm_head.weight.fp8"), places("mtp.onnx", "draft_head.weight.fp8")
    assert {key: offset for key, (offset, _) in whole.items()} == {key: offset for key, (offset, _) in part.items()}
    assert all(part[key][1] * 2 == whole[key][1] for key in ("", ".scales"))


def test_who_takes_it(release: QuantizedCheckpoint, source: Path) -> None:
    checkpoint = open_checkpoint(release.path)
    assert default_precision(checkpoint, "onnxruntime", "cuda") == "fp8"
    assert default_precision(checkpoint, "onnxruntime", "cpu") == "fp32"
    assert default_precision(open_checkpoint(source), "onnxruntime", "cuda") == "fp16"
    with pytest.raises(UnsupportedError, match="no products with fp8 weights on cpu, only on cuda: int8 takes as many bytes"):
        plan_of(release.path, device="cpu")
    for target in ("onnx", "directml"):
        with pytest.raises(UnsupportedError, match="has no precision 'fp8'"):
            plan_build(checkpoint, target, "cpu" if target == "onnx" else "dml", "fp8")
    engines = plan_build(checkpoint, "tensorrt", "cuda", "fp8").quantization
    assert engines is not None and str(engines.groups["mlp"]) == "fp8"
    assert "(this target has a scale per row)" in next(iter(engines.outcome["mlp"]))


def test_a_plan_file_cannot_bring_it_where_it_is_not(source: Path, plan_toml: Path) -> None:
    plan_toml.write_text('[matrices]\n"*.down_proj" = { format = "fp8" }')
    with pytest.raises(UnsupportedError, match="no products with fp8 weights on cpu"):
        plan_of(source, "int8", "cpu", plan_file=plan_toml)
    with pytest.raises(UnsupportedError, match="target onnx has no fp8 weights"):
        plan_build(open_checkpoint(source), "onnx", "cpu", "int8", plan_file=plan_toml)
    plan = plan_of(source, "int8", plan_file=plan_toml).quantization
    assert plan is not None and str(plan.of("layers.0.mlp.down_proj.weight")) == "fp8 128x128"


def test_inspect_tells(release: QuantizedCheckpoint) -> None:
    entries = {(e["target"], e["device"], e["precision"]): e for e in inspect_checkpoint(release.path)["targets"]}
    cuda, cpu = entries["onnxruntime", "cuda", "fp8"], entries["onnxruntime", "cpu", "fp8"]
    assert cuda["supported"] and cuda["quantized_matrices"] == {"kept: fp8 128x128": 32}
    assert not cpu["supported"] and "int8 takes as many bytes here" in cpu["why"]
    assert cuda["bundle_bytes"] < 0.6 * entries["onnxruntime", "cuda", "fp16"]["bundle_bytes"]


def test_codes_that_are_no_numbers(release: QuantizedCheckpoint, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in release.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    codes = tensors[name].view(torch.uint8).clone()
    codes[5, 7] = 0xFF
    save_file(tensors | {name: codes.view(torch.float8_e4m3fn)}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"not finite.*{name}"):
        build(copy, tmp_path / "bundle", device="cuda", precision="fp8", max_context=64)
