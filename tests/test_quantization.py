"""Precision plans, rounding methods, the packed layout, and quantized bundles."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.lower_graphs import lower
from qwen_export.errors import CheckpointError, ConfigError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.quantization.packing import QuantFormat, dequantize, pack, unpack
from qwen_export.graphs.quantization.precision_plan import GROUPS, PrecisionPlan, default_plan, group_of, load_plan
from qwen_export.graphs.quantization.quantized_weights import Quantized
from qwen_export.graphs.quantization.scale_search import NUMPY_SEARCH, ScaleSearch, quantize
from qwen_export.graphs.weights.expression import HeadRows, Stacked, StoredWeight
from qwen_export.manifest import WEIGHTS, load_manifest
from qwen_export.plugins.native.native_library import LIBRARIES, find_library
from qwen_export.plugins.native.native_search import find_search
from qwen_export.verification.logit_check import verify
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize
from tests.support.tiny_tokenizer import write_tiny_tokenizer

PlanFile = Callable[[str], Path]


@pytest.fixture
def plan_file(tmp_path: Path) -> PlanFile:
    def write(text: str) -> Path:
        path = tmp_path / "plan.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def with_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU plugin, for tests that only lower."""
    if find_library("cpu") is None:
        path = tmp_path / LIBRARIES["cpu"].file
        path.write_bytes(b"kernels")
        monkeypatch.setenv(LIBRARIES["cpu"].variable, str(path))


needs_plugin = pytest.mark.skipif(find_library("cpu") is None, reason="the CPU plugin is not built: plugins/native/cpu/build.sh")


# ---- the layout ----


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from((4, 8)),
    block=st.sampled_from((32, 64, 128)),
    zeros=st.booleans(),
    wide=st.booleans(),
    N=st.integers(1, 50),
    K=st.integers(1, 700),
)
def test_packing_loses_nothing(bits: int, block: int, zeros: bool, wide: bool, N: int, K: int) -> None:
    format, rng = QuantFormat(bits, block, zeros, wide), np.random.default_rng(0)
    codes = rng.integers(0, 1 << bits, (N, K)).astype(np.uint8)
    scales = rng.normal(size=(N, format.blocks(K))).astype(format.scale_dtype)
    given_zeros = rng.integers(0, 1 << bits, scales.shape).astype(np.uint8) if zeros else None
    packed = pack(format, codes, scales, given_zeros)
    assert packed.shape == format.packed_shape(N, K)
    back = unpack(format, packed, N, K)
    for got, wanted in zip(back, (codes, scales, given_zeros), strict=True):
        assert got is wanted is None or np.array_equal(got, wanted)


def test_the_first_panels_are_the_first_rows() -> None:
    format, rng = QuantFormat(4, 32), np.random.default_rng(0)
    codes, scales = rng.integers(0, 16, (64, 96)).astype(np.uint8), rng.normal(size=(64, 3))
    assert np.array_equal(pack(format, codes, scales)[:2], pack(format, codes[:32], scales[:32]))


def test_bits_per_weight() -> None:
    assert QuantFormat(4, 32).bits_per_weight(1024) == 4.5
    assert QuantFormat(8, 128).bits_per_weight(1024) == 8.125


# ---- methods ----


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_search_is_never_worse_than_rounding(bits: int, zeros: bool) -> None:
    format = QuantFormat(bits, 32, zeros, wide_scales=True)
    w = np.random.default_rng(0).standard_t(4, size=(64, 256)).astype(np.float32)

    def errors(method: str) -> Any:
        return ((dequantize(format, *quantize(format, w, method)) - w) ** 2).reshape(64, -1, 32).sum(axis=2)

    nearest, searched = errors("rtn"), errors("search")
    assert (searched <= nearest * 1.001 + 1e-12).all()
    assert searched.sum() < (0.8 if bits == 4 and not zeros else 1.0) * nearest.sum()


@needs_plugin
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_plugins_search_leaves_the_error_of_numpys(bits: int, block: int) -> None:
    """Sums of another order may choose another range where two leave the same error."""
    format = QuantFormat(bits, block)
    w = np.random.default_rng(block).standard_t(4, (64, 4 * block)).astype(np.float32)
    w[3, :block] = 0
    w[5] = -np.abs(w[5])

    def errors(search: ScaleSearch) -> npt.NDArray[np.float64]:
        codes, scales, _ = quantize(format, w, "search", search)
        return ((dequantize(format, codes, scales) - w).astype(np.float64) ** 2).reshape(-1, block).sum(axis=1)

    plugin = find_search()
    assert plugin is not None
    native = errors(plugin)
    # What tells ranges apart is a difference of numbers as large as the block's squares, in fp32.
    slack = 4e-6 * (w.astype(np.float64) ** 2).reshape(-1, block).sum(axis=1)
    assert (np.abs(native - errors(NUMPY_SEARCH)) <= slack).all()
    assert native[3 * 4] == 0


@needs_plugin
@pytest.mark.parametrize("top", [8.0, 128.0])
def test_the_plugins_codes_are_numpys(top: float) -> None:
    """Ties go to even, what is beyond the ends is clipped, and a block of zeros has the middle."""
    w = np.random.default_rng(0).normal(0, top, (300, 32)).astype(np.float32)
    w[0], w[1], w[2] = np.arange(32) - 15.5, 1e30, 0
    inverse = np.random.default_rng(1).normal(0, 1, 300).astype(np.float32)
    inverse[:3] = 1, -1, 0
    plugin = find_search()
    assert plugin is not None
    assert np.array_equal(plugin.codes(w, inverse, top), NUMPY_SEARCH.codes(w, inverse, top))


@pytest.mark.parametrize("method", ["rtn", "search"])
@pytest.mark.parametrize("zeros", [False, True])
def test_values_on_a_grid_come_back(method: str, zeros: bool) -> None:
    """Codes of both ends in every block: the grid is the only one that fits."""
    format, rng = QuantFormat(4, 32, zeros), np.random.default_rng(1)
    codes = rng.integers(0 if zeros else 1, 16, (8, 64))
    codes[:, ::32], codes[:, 1::32] = (0, 15) if zeros else (1, 15)
    w = (codes - (6 if zeros else 8)).astype(np.float32) * np.float32(0.0625)
    assert np.array_equal(dequantize(format, *quantize(format, w, method)), w)


def test_blocks_of_zeros_are_exact_and_huge_weights_are_an_error() -> None:
    format = QuantFormat(4, 32)
    assert not dequantize(format, *quantize(format, np.zeros((3, 40), np.float32), "search")).any()
    with pytest.raises(CheckpointError, match="too large"):
        quantize(format, np.full((1, 32), 1e7, np.float32), "rtn")


class _Rows:
    """A source of one matrix."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def rows(self, name: str, start: int, stop: int) -> Any:
        return self.values[start:stop]


def test_a_quantized_expression_is_the_matrix_quantized() -> None:
    """Over stacked and picked rows, in blocks that end within a panel."""
    values = np.random.default_rng(0).normal(size=(6 * 32, 1000)).astype(np.float32)
    stored = StoredWeight("w", values.shape, ir.DataType.FLOAT)
    picked = Stacked((HeadRows(stored, 64, 0, 32), HeadRows(stored, 64, 32, 32)))
    whole = np.concatenate([values.reshape(3, 2, 32, -1)[:, half].reshape(96, -1) for half in (0, 1)])
    weight = Quantized(picked, QuantFormat(4, 64), "search")
    wanted = pack(weight.format, *quantize(weight.format, whole, "search"))
    assert np.array_equal(weight.evaluate(_Rows(values)), wanted)
    assert np.array_equal(weight.rows(_Rows(values), 2, 5), wanted[2:5])
    assert weight.nbytes == wanted.nbytes


# ---- plans ----


def test_every_matrix_has_a_group_and_nothing_else_has() -> None:
    groups = {
        "embed_tokens.weight": "embedding",
        "layers.0.linear_attn.in_proj_qkv.weight": "deltanet",
        "layers.0.linear_attn.in_proj_a.weight": "in_proj_ab",
        "layers.0.linear_attn.out_proj.weight": "deltanet",
        "layers.0.linear_attn.conv1d.weight": "",
        "layers.0.linear_attn.norm.weight": "",
        "layers.0.linear_attn.A_log": "",
        "layers.3.self_attn.q_proj.weight": "attention",
        "layers.3.self_attn.q_norm.weight": "",
        "layers.3.input_layernorm.weight": "",
        "layers.3.mlp.up_proj.weight": "mlp",
        "layers.3.mlp.gate.weight": "router",
        "layers.3.mlp.shared_expert_gate.weight": "router",
        "layers.3.mlp.shared_expert.up_proj.weight": "shared_expert",
        "layers.3.mlp.experts.gate_up_proj": "experts",
        "layers.3.mlp.experts.7.up_proj.weight": "experts",
        "norm.weight": "",
        "lm_head.weight": "lm_head",
        "mtp.layers.0.self_attn.q_proj.weight": "mtp",
        "mtp.layers.0.mlp.gate.weight": "router",
        "mtp.fc.weight": "mtp",
    }
    assert {name: group_of(name) for name in groups} == groups


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_defaults_leave_gates_and_router_alone(precision: str) -> None:
    plan = default_plan(precision)
    assert {group for group in GROUPS if plan.groups[group].quant is None} == {"in_proj_ab", "router", "vision"}
    assert PrecisionPlan.from_json({"weights": "fp32; as stored", "activations": "fp32"} | plan.to_json()) == plan


def test_a_file_overrides_groups_and_matrices(plan_file: PlanFile) -> None:
    file = plan_file(
        '[mlp]\nblock = 128\nzeros = true\n[attention]\nformat = "int8"\n'
        '[matrices]\n"layers.0.*" = { format = "stored" }\n"*.down_proj" = { block = 64 }'
    )
    plan = load_plan("int4", file, tied=False)
    assert str(plan.groups["mlp"]) == "int4 block 128 search zeros"
    assert str(plan.groups["attention"]) == "int8 block 32 rtn", "the method follows the number of bits"
    assert plan.of("layers.0.mlp.up_proj.weight").quant is None
    assert str(plan.of("layers.1.mlp.down_proj.weight")).startswith("int4 block 64")
    assert PrecisionPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[mpl]\nblock = 32", "no such group"),
        ("[mlp]\nblock = 48", "block of the precision plan cannot be used"),
        ("[mlp]\nblock = true", "block of the precision plan cannot be used"),
        ('[mlp]\nformat = "int3"', "format of the precision plan cannot be used"),
        ('[mlp]\nmode = "fast"', "mode of the precision plan cannot be used"),
        ("mlp = 4", "is not a table"),
        ("[mlp", "not TOML"),
        ('[router]\nformat = "int8"', "router.*never quantized"),
        ('[lm_head]\nformat = "int4"', "head of this checkpoint is its embedding"),
    ],
)
def test_a_wrong_plan_is_one_sentence(text: str, message: str, plan_file: PlanFile) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_plan("int4", plan_file(text), tied=True)
    assert "\n" not in str(raised.value)


def test_a_plan_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_plan("int4", Path("/no/plan.toml"), tied=True)


# ---- builds ----


def lowered(checkpoint: Path, file: Path | None = None) -> Counter[str]:
    source = open_checkpoint(checkpoint)
    model = lower(source, plan_build(source, precision="int4", plan_file=file))["decoder"]
    return Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph)


@pytest.mark.usefixtures("with_library")
def test_what_the_plan_names_is_quantized_and_nothing_else(tiny_checkpoint: Path, plan_file: PlanFile) -> None:
    counts = lowered(tiny_checkpoint)
    assert counts["qwen.native.QuantSwiGlu"] == 4 and counts["qwen.native.QuantGather"] == 1
    assert counts["qwen.native.Linear"] == 3, "in_proj_a and in_proj_b of three layers, in one product"
    counts = lowered(tiny_checkpoint, plan_file('[mlp]\nformat = "stored"\n[embedding]\nformat = "stored"'))
    assert counts["qwen.native.QuantSwiGlu"] == 0 and counts["qwen.native.SwiGlu"] == 4 and counts["qwen.native.QuantGather"] == 0


@pytest.mark.usefixtures("with_library")
def test_a_stack_is_cut_where_the_format_changes(tiny_checkpoint: Path, plan_file: PlanFile) -> None:
    before = lowered(tiny_checkpoint)
    counts = lowered(tiny_checkpoint, plan_file('[matrices]\n"layers.0.linear_attn.in_proj_z" = { format = "stored" }'))
    assert counts["Concat"] == before["Concat"] + 1 and counts["qwen.native.Linear"] == before["qwen.native.Linear"] + 1
    assert counts["qwen.native.QuantLinear"] == before["qwen.native.QuantLinear"]


@needs_plugin
def test_the_draft_head_reads_the_first_panels_of_the_head(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = build(tiny_checkpoint, tmp_path / "bundle", precision="int8", draft_vocab=256)

    def places(file: str, name: str) -> dict[str, int]:
        tensors = onnx.load(bundle / file, load_external_data=False).graph.initializer
        (tensor,) = [tensor for tensor in tensors if name in tensor.name and tensor.data_type == onnx.TensorProto.UINT8]
        return {entry.key: int(entry.value) for entry in tensor.external_data if entry.key in ("offset", "length")}

    whole, part = places("decoder.onnx", "lm_head"), places("mtp.onnx", "draft_head")
    assert part["offset"] == whole["offset"] and part["length"] * 2 == whole["length"]


@pytest.mark.usefixtures("with_library")
def test_gate_and_up_of_two_formats_are_refused(tiny_checkpoint: Path, plan_file: PlanFile) -> None:
    with pytest.raises(ConfigError, match="gate_proj and up_proj of a layer one format"):
        lowered(tiny_checkpoint, plan_file('[matrices]\n"*.up_proj" = { format = "int8" }'))


def test_without_the_library_quantized_builds_are_refused(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARIES["cpu"].variable, "")
    with pytest.raises(UnsupportedError, match="int4 needs the library of native kernels"):
        plan_build(open_checkpoint(tiny_checkpoint), precision="int4")


@pytest.mark.usefixtures("with_library")
def test_other_builds_refuse_a_plan(tiny_checkpoint: Path, plan_file: PlanFile) -> None:
    source = open_checkpoint(tiny_checkpoint)
    with pytest.raises(UnsupportedError, match="overrides the precisions int8, int4 or fp8, not fp32"):
        plan_build(source, plan_file=plan_file("[mlp]\nblock = 64"))


@needs_plugin
@pytest.mark.parametrize(("precision", "tied"), [("int8", True), ("int4", False)])
def test_a_quantized_bundle_computes_what_its_codes_say(precision: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = synthesize(tiny_config(tied=tied), tmp_path / "checkpoint", tokenizer=write_tiny_tokenizer(tmp_path / "tokenizer"))
    bundle = build(checkpoint, tmp_path / "bundle", precision=precision)
    manifest = load_manifest(bundle)
    assert PrecisionPlan.from_json(manifest.precision_plan).groups["mlp"].format == precision
    result = verify(bundle, checkpoint)
    assert result["passed"], result
    assert sum(check["against"] == "eager, quant." for check in result["checks"]) == 6, "three of text, three of pictures"


@needs_plugin
def test_the_size_is_the_one_that_inspect_tells_and_tied_weights_are_stored_once(tmp_path: Path) -> None:
    checkpoint = synthesize(
        tiny_config(tied=True, vision=False, vocab_size=4096), tmp_path / "c", tokenizer=write_tiny_tokenizer(tmp_path / "tokenizer")
    )
    plan = plan_build(open_checkpoint(checkpoint), precision="int4", mtp=False)
    bundle = build(checkpoint, tmp_path / "bundle", precision="int4", mtp=False)
    initializers = onnx.load(bundle / "decoder.onnx", load_external_data=False).graph.initializer
    stored = [tensor for tensor in initializers if "embed_tokens" in tensor.name]
    assert len(stored) == 1 and stored[0].dims[0] == 4096 // 16
    sizes = [sum(int(entry.value) for entry in tensor.external_data if entry.key == "length") for tensor in initializers]
    assert abs(sum(sizes) - plan.bundle_bytes) < 0.02 * plan.bundle_bytes


@needs_plugin
def test_a_build_is_reproducible(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first, second = (build(tiny_checkpoint, tmp_path / name, precision="int4") for name in ("a", "b"))
    assert load_manifest(first).files[WEIGHTS] == load_manifest(second).files[WEIGHTS]
    shutil.rmtree(second)


@pytest.mark.usefixtures("with_library")
def test_inspect_tells_the_sizes(tiny_checkpoint: Path) -> None:
    from qwen_export.bundles.inspection import inspect_checkpoint

    targets = inspect_checkpoint(tiny_checkpoint)["targets"]
    sizes = {entry["precision"]: entry.get("bundle_bytes") for entry in targets if entry["device"] == "cpu" and entry["supported"]}
    assert sizes["int4"] < sizes["int8"] < sizes["fp32"]
    assert json.dumps(targets)
