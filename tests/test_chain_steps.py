"""Chains: which nodes of a CUDA graph become one, and that it says what they were. Needs no device."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.lower_graphs import lower
from qwen_export.building.pass_pipeline import print_graph
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.layer_points import POINTS, point_name
from qwen_export.graphs.passes.pass_context import new_node
from qwen_export.manifest import load_manifest
from qwen_export.plugins.native import native_library
from qwen_export.plugins.onnxruntime.chain_steps import LEAST, MOST, expand_chains, join_chains
from qwen_export.plugins.onnxruntime.chain_wiring import INPUTS, OUTPUTS, read_wiring
from qwen_export.verification.layer_graphs import layer_graphs
from tests.support.chains import LayerNodes, terms
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize

Lower = Callable[..., dict[str, ir.Model]]
LAYERS = 8
PARTS = ("Linear", "SwiGlu", "QuantLinear", "QuantSwiGlu", "Fp8Linear", "Fp8SwiGlu", "DeltaNet")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight layers, of which the fourth and the last attend."""
    folder, sizes = tmp_path_factory.mktemp("chains"), {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "layers": LAYERS}
    return {kind: synthesize(tiny_config(vision=False, moe=kind == "moe", **sizes), folder / kind) for kind in ("dense", "moe")}


@pytest.fixture
def graphs(checkpoints: dict[str, Path], fake_library: Path) -> Lower:
    def lowered(kind: str = "dense", precision: str = "int4", **options: Any) -> dict[str, ir.Model]:
        source = open_checkpoint(checkpoints[kind])
        return lower(source, plan_build(source, "onnxruntime", "cuda", precision, **options))

    return lowered


def chains(model: ir.Model) -> list[list[str]]:
    """The parts of each chain."""
    wirings = [node.attributes.get_string("wiring") for node in model.graph if node.op_type == "Chain"]
    return [[part.op for part in read_wiring(wiring)] for wiring in wirings]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int4", "fp8"])
def test_everything_between_two_attention_kernels_is_one_node(graphs: Lower, precision: str) -> None:
    form = {"int4": "Quant", "fp8": "Fp8"}.get(precision, "")
    linear, mlp = f"{form}Linear", [f"{form}Linear", f"{form}SwiGlu", f"{form}Linear"]
    model = graphs(precision=precision)["decoder"]
    recurrent = [linear, "DeltaNet", *mlp]
    assert chains(model) == [recurrent * 3 + [linear], mlp + recurrent * 3 + [linear], mlp]
    counts = Counter(node.op_type for node in model.graph)
    assert counts["GatedAttention"] == 2
    assert sum(counts[op] for op in PARTS) == 1, "the head, behind the choice of rows"


def test_the_draft_head_has_no_chain(graphs: Lower) -> None:
    """Its stream may be the first with a chain, and the decoder's would have none."""
    assert not chains(graphs()["mtp"])


def test_what_others_read_leaves_a_chain(graphs: Lower) -> None:
    model = graphs()["decoder"]
    names = [sorted(value.name for value in node.outputs if value.name) for node in model.graph if node.op_type == "Chain"]
    states = [f"layers.{layer}.{state}.next" for layer in range(3) for state in ("conv_history", "pending", "recurrent")]
    assert names[0] == sorted([*states, "layers.2.output", "layers.3.self_attn.linear.0.0"])
    assert names[2] == ["layers.7.output"]
    for value in model.graph.outputs:
        assert value.dtype is not None and value.shape is not None, value.name


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_a_chain_computes_what_its_parts_did(graphs: Lower, kind: str, precision: str) -> None:
    model = graphs(kind, precision)["decoder"]
    joined, text = terms(model.graph), print_graph(model.graph)
    expand_chains(model.graph)
    assert not chains(model)
    assert terms(model.graph) == joined
    join_chains(model.graph)
    assert print_graph(model.graph) == text, "nothing is lost, names included"


def test_experts_end_a_chain(graphs: Lower) -> None:
    found = chains(graphs("moe")["decoder"])
    assert found == [["QuantLinear", "DeltaNet", "QuantLinear"]] * 6, "the mixer of each layer; two nodes stay two nodes"


def test_no_chain_crosses_a_stage(graphs: Lower, checkpoints: dict[str, Path]) -> None:
    source = open_checkpoint(checkpoints["dense"])
    layers = len(source.config.text.layer_types)
    whole = graphs()["decoder"]
    for stages in (2, 4, layers):
        cut = graphs(stages=stages)
        assert len([name for name in cut if name.startswith("decoder")]) == stages
        made = [value.name for name, model in cut.items() if name.startswith("decoder") for value in model.graph.outputs]
        assert {value.name for value in whole.graph.outputs} <= set(made)
        assert sum(len(parts) for name, model in cut.items() if name.startswith("decoder") for parts in chains(model)) >= 3 * layers


def test_a_check_of_layers_sees_into_chains(checkpoints: dict[str, Path], fake_library: Path, tmp_path: Path) -> None:
    """The points leave the chains, which stay as they are."""
    bundle = build(checkpoints["dense"], tmp_path / "bundle", device="cuda", precision="int4", mtp=False)
    manifest, config = load_manifest(bundle), open_checkpoint(checkpoints["dense"]).config.text
    written = ir.load(bundle / manifest.graphs["decoder"].file)
    with layer_graphs(bundle, manifest, config) as (there, changed):
        model = ir.load(there / changed.graphs["decoder"].file)
        points = {point_name(layer, point) for layer in range(LAYERS) for point in POINTS}
        assert points < {value.name for value in model.graph.outputs} == {tensor.name for tensor in changed.graphs["decoder"].outputs}
        assert chains(model) == chains(written)
        now = terms(model.graph)
        assert {name: now[name] for name in terms(written.graph)} == terms(written.graph)


def test_without_the_library_there_are_none(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native_library.LIBRARIES["cuda"].variable, "")
    source = open_checkpoint(checkpoints["dense"])
    plan = plan_build(source, "onnxruntime", "cuda", "fp16")
    assert "chain" not in plan.choices and not chains(lower(source, plan)["decoder"])


def test_a_chain_is_no_longer_than_its_node_allows() -> None:
    """The nodes of many layers behind each other, all without attention."""
    graph = _long(30)
    before = terms(graph)
    join_chains(graph)
    lengths = [len(read_wiring(node.attributes.get_string("wiring"))) for node in graph if node.op_type == "Chain"]
    assert max(lengths) <= MOST and min(lengths) >= LEAST and len(lengths) > 1
    assert all(len(node.inputs) <= sum(INPUTS.values()) and len(node.outputs) <= sum(OUTPUTS.values()) for node in graph)
    assert terms(graph) == before


def _long(count: int) -> ir.Graph:
    half = ir.TensorType(ir.DataType.FLOAT16)
    x = ir.Value(name="x", type=half, shape=ir.Shape([None, None, 64]))
    inputs, nodes, value = [x], [], x
    for i in range(count):
        given = [ir.Value(name=f"{name}.{i}", type=half, shape=ir.Shape([64, 64])) for name in ("w", "norm")]
        inputs += given
        node = new_node(native_library.NATIVE, "Linear", [value, given[0], value, given[1]], dtype=ir.DataType.FLOAT16, epsilon=1e-6)
        value = node.outputs[0]
        value.name, value.shape = f"y.{i}", x.shape
        nodes.append(node)
    return ir.Graph(inputs, [value], nodes=nodes, opset_imports={"": 21, native_library.NATIVE: 1}, name="long")


def test_what_is_made_of_a_part_is_no_input_of_the_chain() -> None:
    """A product whose residual another node makes of a value inside: it cannot come before that node."""
    graph = _long(8)
    last = list(graph)[5]
    other = new_node("", "Relu", [last.inputs[0]], dtype=ir.DataType.FLOAT16)
    other.outputs[0].name = "other"
    graph.insert_before(last, other)
    last.replace_input_with(2, other.outputs[0])
    before = terms(graph)
    assert join_chains(graph) == 2
    assert terms(graph) == before
    order = [node.op_type for node in graph]
    assert order == ["Chain", "Relu", "Chain"]


@pytest.mark.parametrize("kind", ["plain", "int4"])
@pytest.mark.parametrize("P", [None, 3])
def test_the_nodes_that_run_on_a_device(kind: str, P: int | None) -> None:
    """The graph of test_chain_gpu.py."""
    graph = LayerNodes("float16", kind, 1, 2, P).model().graph
    before = terms(graph)
    assert join_chains(graph) == 1 and len(graph) == 1
    assert terms(graph) == before


def test_the_library_has_as_many_tensors_of_each_type() -> None:
    source = (Path(native_library.__file__).parent / "chain_op.cc").read_text(encoding="utf-8")
    line = re.search(r"constexpr size_t (kOwn = .*);", source)
    assert line is not None
    counts = [int(number) for number in re.findall(r"\d+", line[1])]
    assert counts == [*INPUTS.values(), *OUTPUTS.values()]
