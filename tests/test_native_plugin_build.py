"""Where a build for CUDA uses the plugin. Needs no device. What it joins to chains is taken apart here; test_chain_steps.py has those."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.lower_graphs import lower
from qwen_export.errors import BundleError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.manifest import SpeculationSpec, load_manifest
from qwen_export.plugins.native import native_library as library
from qwen_export.plugins.onnxruntime.chain_steps import expand_chains
from qwen_export.runtimes.backends.integrity import ensure_whole
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize

LIBRARY, VARIABLE = library.LIBRARIES["cuda"].file, library.LIBRARIES["cuda"].variable


@pytest.fixture
def narrow_heads(make_checkpoint: Callable[..., Path]) -> Path:
    """A tiny checkpoint with DeltaNet heads of 16."""
    return make_checkpoint(tiny_config(vision=False), with_mtp=False)


def lowered(checkpoint: Path, precision: str) -> Counter[str]:
    """Operators of the CUDA graph and how often each occurs."""
    source = open_checkpoint(checkpoint)
    model = lower(source, plan_build(source, "onnxruntime", "cuda", precision))["decoder"]
    expand_chains(model.graph)
    return Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph)


def test_a_delta_net_layer_is_five_launches(wide_heads: Path, fake_library: Path) -> None:
    counts = lowered(wide_heads, "fp16")
    linear, attention = 3, 1
    assert counts["qwen.native.DeltaNet"] == linear
    assert counts["qwen.native.SwiGlu"] == linear + attention
    # in, out and down of a layer; the head
    assert counts["qwen.native.Linear"] == 3 * (linear + attention) + 1
    assert counts["qwen.native.GatedAttention"] == attention
    assert counts["qwen.native.RmsNorm"] == 1, "only the last norm is a node: rows are picked after it"
    assert not {
        "Add",
        "Split",
        "Sigmoid",
        "SimplifiedLayerNormalization",
        "com.microsoft.GroupQueryAttention",
        "com.microsoft.SkipSimplifiedLayerNormalization",
        "com.microsoft.FusedMatMul",
    } & set(counts)


def test_what_is_pending_is_one_tensor_per_layer(wide_heads: Path, fake_library: Path) -> None:
    """Without the pass that folds the transaction away: the packed projection leaves the graph and comes back in."""
    source = open_checkpoint(wide_heads)
    plan = plan_build(source, "onnxruntime", "cuda", "bf16")
    passes = tuple(step for step in plan.target.passes if step.name != "fold_transaction")
    model = lower(source, replace(plan, target=replace(plan.target, passes=passes)))["decoder"]
    expand_chains(model.graph)
    inputs, outputs = ({value.name: value for value in values} for values in (model.graph.inputs, model.graph.outputs))
    nodes = [node for node in model.graph if node.op_type == "DeltaNet"]
    assert len(nodes) == 3
    assert [name for name in inputs if name and "pending" in name] == [f"layers.{i}.pending" for i in range(3)]
    assert [name for name in outputs if name and "pending" in name] == [f"layers.{i}.pending.next" for i in range(3)]
    for i, node in enumerate(nodes):
        before, after = inputs[f"layers.{i}.pending"], outputs[f"layers.{i}.pending.next"]
        assert [*node.inputs[7:]] == [before, inputs["accepted"], inputs["commit"]]
        assert node.inputs[0] is after and after.producer().op_type == "Linear"
        width = source.config.text.conv_dim + source.config.text.value_dim + 2 * source.config.text.linear_num_value_heads
        assert [*before.shape] == ["B", "P", width] and [*after.shape] == ["B", "T", width]
        assert before.dtype == after.dtype == node.outputs[0].dtype
    states = [name for name in inputs if name and f"{name}.next" in outputs]
    assert states[:3] == ["layers.0.conv_history", "layers.0.recurrent", "layers.0.pending"], "in the order of the module"
    assert Counter(node.op_type for node in model.graph)["Linear"] == 3 * 4 + 1, "the projection is made once"


def test_the_demo_speculates(demo_checkpoint: Path, fake_library: Path, tmp_path: Path) -> None:
    """Its heads have 64 values."""
    assert plan_build(open_checkpoint(demo_checkpoint), "onnxruntime", "cuda", "fp16").choices["gated_delta_net"].name == "plugin_cuda"
    manifest = load_manifest(build(demo_checkpoint, tmp_path / "bundle", device="cuda", precision="fp16"))
    assert list(manifest.graphs) == ["decoder", "mtp"] and manifest.plugins == (LIBRARY,)
    assert manifest.speculation == SpeculationSpec(7, 8192)
    assert len([state for state in manifest.graphs["decoder"].states if state.pending]) == 6


def test_delta_net_does_not_need_our_products(tmp_path: Path, fake_library: Path) -> None:
    """A vocabulary of an odd size: the products are ONNX Runtime's, and speculation stays."""
    config = tiny_config(vision=False, linear_key_head_dim=64, linear_value_head_dim=64, vocab_size=509)
    plan = plan_build(open_checkpoint(synthesize(config, tmp_path / "odd")), "onnxruntime", "cuda", "fp16")
    assert plan.choices["linear"].name == "fused_matmul" and plan.choices["gated_delta_net"].name == "plugin_cuda"
    assert plan.speculation is not None


@pytest.mark.parametrize("odd", [{"linear_key_head_dim": 32, "linear_value_head_dim": 32}, {"linear_conv_kernel_dim": 3}], ids=str)
def test_what_the_delta_net_does_not_take(tmp_path: Path, fake_library: Path, odd: dict[str, int]) -> None:
    config = tiny_config(vision=False, **({"linear_key_head_dim": 64, "linear_value_head_dim": 64} | odd))
    plan = plan_build(open_checkpoint(synthesize(config, tmp_path / "odd")), "onnxruntime", "cuda", "fp16")
    assert plan.choices["gated_delta_net"].name == "builtin_cuda"
    assert plan.speculation is None and "keys and values of 64 or of 128 values" in plan.no_head


def test_keys_and_values_of_different_sizes_are_refused(tmp_path: Path, fake_library: Path) -> None:
    config = tiny_config(vision=False, linear_key_head_dim=128, linear_value_head_dim=64)
    with pytest.raises(UnsupportedError, match="takes keys and values of one size, and this model has 128 and 64"):
        plan_build(open_checkpoint(synthesize(config, tmp_path / "odd")), "onnxruntime", "cuda", "fp16")


def test_heads_of_another_size_keep_the_kernel_of_the_runtime(narrow_heads: Path, fake_library: Path) -> None:
    counts = lowered(narrow_heads, "bf16")
    assert counts["com.microsoft.GatedDeltaNet"] == 3 and counts["qwen.native.DeltaNet"] == 0
    assert counts["qwen.native.SwiGlu"] == 4


def test_without_the_library_nothing_changes(narrow_heads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert not [name for name in lowered(narrow_heads, "fp16") if name.startswith(library.NATIVE)]


def test_the_bundle_carries_and_hashes_the_library(wide_heads: Path, fake_library: Path, tmp_path: Path) -> None:
    bundle = build(wide_heads, tmp_path / "bundle", device="cuda", precision="fp16")
    manifest = load_manifest(bundle)
    assert manifest.plugins == (LIBRARY,)
    assert not [name for name in manifest.target.operators if name.startswith(library.NATIVE)], "not asked of ONNX Runtime"
    ensure_whole(bundle, manifest)
    (bundle / LIBRARY).write_bytes(b"kernel$")
    with pytest.raises(BundleError, match="changed or damaged"):
        ensure_whole(bundle, manifest)
    (bundle / LIBRARY).unlink()
    with pytest.raises(BundleError, match="missing"):
        ensure_whole(bundle, manifest)


def test_a_cpu_bundle_has_no_cuda_plugin(wide_heads: Path, fake_library: Path) -> None:
    source = open_checkpoint(wide_heads)
    assert fake_library not in plan_build(source).plugins and fake_library in plan_build(source, device="cuda", precision="fp16").plugins


def test_a_built_library_loads_without_a_device() -> None:
    path = Path(library.__file__).parent / LIBRARY
    if not path.is_file():
        pytest.skip("not built")
    assert ctypes.CDLL(str(path)).RegisterCustomOps
