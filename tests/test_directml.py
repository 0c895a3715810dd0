"""Target directml: every node has a kernel there, by version and type; the graph files run here on ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.lower_graphs import lower
from qwen_export.building.static_plan import StaticOptions
from qwen_export.errors import BundleError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.passes.pass_context import PassContext, new_node
from qwen_export.manifest import load_manifest
from qwen_export.plugins.directml.check_operators import check_operators, refusal
from qwen_export.plugins.directml.directml_operators import operator_table
from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.static_decoder import StaticDecoder
from qwen_export.runtimes.memory.device import BUFFERS
from qwen_export.runtimes.memory.directml_buffer import DmlBuffer
from qwen_export.verification.logit_check import TOLERANCE
from tests.support.static_bundles import Reference, reference_logits, steps_around_a_snapshot, unoptimized
from tests.support.synthesize import synthesize
from tests.test_parity import prompt, tiny

CAPACITY, CHUNK, GREEDY = 160, 16, 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tiny(value_ratio=2, query_ratio=4, vision=False), tmp_path_factory.mktemp("directml") / "checkpoint", with_mtp=False)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return reference_logits(checkpoint)


@pytest.fixture(scope="module", params=[("fp32", 1), ("fp16", 1), ("fp16", 4)], ids=["fp32", "fp16", "fp16-four"])
def bundle(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    precision, width = request.param
    options = StaticOptions(CHUNK, step_tokens=width)
    output = tmp_path_factory.mktemp("bundles") / "bundle"
    return build(checkpoint, output, target="directml", device="dml", precision=precision, max_context=CAPACITY, options=options)


def test_the_logits_are_those_of_transformers(bundle: Path, reference: Reference) -> None:
    ids, machine = prompt(60), load(bundle, threads=1, device="cpu").decoder()
    expected = reference(ids)
    limit = 1e-4 if load_manifest(bundle).target.precision == "fp32" else TOLERANCE["fp16"] * expected.std()
    assert np.abs(machine.prefill(ids[:50]) - expected[49]).max() <= limit
    for token, row in zip(ids[50:], expected[50:], strict=True):
        assert np.abs(machine.step([token])[0] - row).max() <= limit


def test_calls_of_several_chunks_of_the_delta_rule(checkpoint: Path, reference: Reference, tmp_path: Path) -> None:
    options = StaticOptions(128)
    made = build(checkpoint, tmp_path / "bundle", target="directml", device="dml", precision="fp16", max_context=CAPACITY, options=options)
    ids = prompt(110)
    expected, machine = reference(ids)[-1], load(made, threads=1, device="cpu").decoder()
    assert np.abs(machine.prefill(ids) - expected).max() <= TOLERANCE["fp16"] * expected.std()


def test_with_nothing_but_directml_operators_the_tokens_are_the_same(bundle: Path, reference: Reference) -> None:
    for name in load_manifest(bundle).graphs:
        model = ir.load(bundle / f"{name}.onnx")
        assert not {f"{node.name}: {reason}" for node in model.graph if (reason := refusal(node, model.opset_imports[""]))}
    ids = prompt(CHUNK + 3, 11)
    tokens = unoptimized(bundle).greedy(ids, GREEDY)
    limit = 1e-4 if load_manifest(bundle).target.precision == "fp32" else 0.05
    for i, token in enumerate(tokens):
        row = reference([*ids, *tokens[:i]])[-1]
        assert row.max() - row[token] <= limit, "another token only where the reference itself is undecided"


def test_buffers_of_the_devices_allocator(bundle: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that DirectML takes, with the CPU's allocator: values bound as such, written and read whole."""
    monkeypatch.setattr(DmlBuffer, "device", "cpu")
    monkeypatch.setitem(BUFFERS, "cpu", DmlBuffer)
    ids = prompt(40)
    first, again = steps_around_a_snapshot(load(bundle, threads=1, device="cpu").decoder(), ids)
    assert np.array_equal(again, first)
    expected = reference(ids)[30]
    assert np.abs(first - expected).max() <= TOLERANCE["fp16"] * expected.std()


def test_one_token_graphs_use_the_attention_kernel_and_others_do_not(bundle: Path) -> None:
    for graph in load_manifest(bundle).graphs.values():
        tokens = next(t.shape[1] for t in graph.inputs if t.name == "input_ids")
        kinds = {node.op_type for node in ir.load(bundle / graph.file).graph}
        assert ("GroupQueryAttention" in kinds) == (tokens == 1)
        assert "ScatterND" not in kinds, "DirectML has none of opset 18 or later"
        in_place = {s.in_place for s in graph.states if s.grows}
        assert in_place == {tokens == 1}


def test_without_directml_the_bundle_is_refused_in_one_sentence(bundle: Path) -> None:
    if "DmlExecutionProvider" in ort.get_available_providers():
        pytest.skip("DirectML is here")
    with pytest.raises(BundleError, match="DmlExecutionProvider"):
        load(bundle)


@pytest.mark.skipif("DmlExecutionProvider" not in ort.get_available_providers(), reason="needs onnxruntime-directml")
def test_on_directml_itself(bundle: Path, reference: Reference) -> None:
    ids, machine = prompt(40), load(bundle).decoder()
    assert isinstance(machine, StaticDecoder)
    expected = reference(ids)
    assert np.abs(machine.prefill(ids) - expected[-1]).max() <= TOLERANCE["fp16"] * expected.std()


# The table


def value(name: str, dtype: ir.DataType = ir.DataType.FLOAT16, shape: tuple[int | str, ...] = (1, 4)) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def constant(name: str, values: list[int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), const_value=ir.tensor(values, dtype=ir.DataType.INT64))


def node(op: str, inputs: list[ir.Value | None], domain: str = "", outputs: int = 1, **attributes: Any) -> ir.Node:
    made = new_node(domain, op, inputs, outputs, like=inputs[0], **attributes)
    for i, result in enumerate(made.outputs):
        result.name = f"result{i}"
    return made


def test_the_table_says_where_it_is_from() -> None:
    table = operator_table()
    assert "DmlExecutionProvider" in table.source
    assert table.date == "2025-10-23"
    assert len(table.operators) > 150
    assert ("", "Loop") not in table.operators


@pytest.mark.parametrize(
    ("op", "opset", "reason"),
    [
        (lambda: node("Reshape", [value("x"), constant("s", [4])]), 21, ""),
        (lambda: node("Reshape", [value("x"), constant("s", [4])]), 20, ""),
        (lambda: node("Reshape", [value("x"), constant("s", [4])]), 23, "opset 23 means version 23"),
        (lambda: node("Reshape", [value("x"), value("s", ir.DataType.INT64)]), 21, "input 1 must be a constant"),
        (lambda: node("Reshape", [value("x"), constant("s", [-1])], allowzero=1), 21, "no size may be -1"),
        (lambda: node("Reshape", [value("x"), constant("s", [4])], allowzero=1), 21, ""),
        (lambda: node("Sigmoid", [value("x", ir.DataType.BFLOAT16)]), 21, "x is bfloat16, and DirectML takes float, float16"),
        (lambda: node("Sigmoid", [value("x")]), 21, ""),
        (lambda: node("Softplus", [value("x")]), 21, ""),
        (lambda: node("Softplus", [value("x")]), 22, "opset 22 means version 22"),
        (lambda: node("ScatterND", [value("x"), value("i", ir.DataType.INT64), value("u")]), 16, ""),
        (lambda: node("ScatterND", [value("x"), value("i", ir.DataType.INT64), value("u")]), 21, "opset 21 means version 18"),
        (lambda: node("Concat", [value("x"), value("y", ir.DataType.BFLOAT16)], axis=1), 21, "y is bfloat16"),
        (lambda: node("RMSNormalization", [value("x"), value("w")]), 21, "has no ai.onnx.RMSNormalization"),
        (lambda: node("SimplifiedLayerNormalization", [value("x"), value("w")]), 21, ""),
        (lambda: node("LinearAttention", [value("x")], "com.microsoft"), 21, "has no com.microsoft.LinearAttention"),
        (
            lambda: node("MatMulNBits", [value("x"), value("w", ir.DataType.UINT8), value("s")], "com.microsoft", K=64, block_size=32),
            21,
            "",
        ),
        (
            lambda: node("MatMulNBits", [value("x"), value("w", ir.DataType.UINT8), value("s")], "com.microsoft", K=80, block_size=32),
            21,
            "K",
        ),
    ],
)
def test_version_type_and_limits_decide(op: Callable[[], ir.Node], opset: int, reason: str) -> None:
    found = refusal(op(), opset)
    assert (reason in found) if reason else not found


def test_several_tokens_through_the_attention_kernel_are_refused() -> None:
    """It would compute, and ignore what was read before."""
    for tokens, reason in ((1, ""), (4, "ignores everything read before")):
        heads = [value(name, shape=(1, tokens, 64)) for name in "qkv"] + [
            value(name, shape=(1, 2, 8, 32)) for name in ("k_cache", "v_cache")
        ]
        counts = [value("length", ir.DataType.INT32, (1,)), constant("total", [8])]
        counts[1].type = ir.TensorType(ir.DataType.INT32)
        found = refusal(node("GroupQueryAttention", [*heads, *counts], "com.microsoft", 3, num_heads=2, kv_num_heads=2), 21)
        assert (reason in found) if reason else not found


def test_a_refused_graph_names_node_and_reason(checkpoint: Path) -> None:
    source = open_checkpoint(checkpoint)
    plan = plan_build(source, "directml", "dml", "fp16", max_context=64, options=StaticOptions(CHUNK))
    model = lower(source, plan)["prefill"]
    context = PassContext(source.config.text, "fp16", plan.choices, opset=22)
    with pytest.raises(
        UnsupportedError, match=r"Softplus layers\.0\.linear_attn\.\S+: opset 22 means version 22 of it, and DirectML has 1"
    ):
        check_operators(model, context)
    model.graph.inputs[0].shape = ir.Shape([1, "T"])
    with pytest.raises(UnsupportedError, match=r"input_ids: its shape .* is not static"):
        check_operators(model, PassContext(source.config.text, "fp16", plan.choices, opset=21))


@pytest.mark.skipif("DmlExecutionProvider" not in ort.get_available_providers(), reason="needs onnxruntime-directml")
def test_the_table_is_what_the_installed_provider_registers() -> None:
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    registered = {(k.domain, k.op_name, k.version_range[0]) for k in native.get_all_opkernel_def() if k.provider == "DmlExecutionProvider"}
    table = {(domain, name, k.first) for (domain, name), operator in operator_table().operators.items() for k in operator.kernels}
    assert table - registered == set(), "the table promises kernels that this release lacks"
