"""The check of a graph after each pass: what it accepts, and what it refuses."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qwen_export.errors import CaptureError
from qwen_export.graphs.passes.check_invariants import verify_graph
from qwen_export.graphs.passes.pass_context import MICROSOFT, new_node


def value(name: str, dtype: ir.DataType | None = ir.DataType.FLOAT, *shape: int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape or (2, 2)), type=None if dtype is None else ir.TensorType(dtype))


def graph_of(inputs: list[ir.Value], nodes: list[ir.Node], outputs: list[ir.Value]) -> ir.Model:
    return ir.Model(ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 21, MICROSOFT: 1, "qwen": 1}), ir_version=10)


def passing_through(domain: str, op: str, inputs: list[ir.Value | None]) -> ir.Model:
    node = new_node(domain, op, inputs, [value("y")])
    return graph_of([v for v in inputs if v is not None], [node], list(node.outputs))


def test_the_verifier_accepts_a_sound_graph() -> None:
    verify_graph(passing_through("", "Identity", [value("x")]), "a test")


@pytest.mark.parametrize(
    ("domain", "op", "index"),
    [
        ("qwen", "gated_delta_net", 5),
        ("qwen", "gated_delta_net", 6),
        ("qwen", "gated_delta_net", 9),
        (MICROSOFT, "LinearAttention", 3),
        (MICROSOFT, "LinearAttentionGate", 1),
        (MICROSOFT, "LinearAttentionGate", 2),
        (MICROSOFT, "GatedDeltaNet", 6),
        (MICROSOFT, "GatedDeltaNet", 7),
    ],
)
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=["fp16", "bf16"])
def test_the_verifier_wants_state_and_decay_in_fp32(domain: str, op: str, index: int, dtype: ir.DataType) -> None:
    inputs: list[ir.Value | None] = [value(f"x{i}") for i in range(10)]
    verify_graph(passing_through(domain, op, inputs), "a test")
    inputs = [value(f"x{i}", dtype if i == index else ir.DataType.FLOAT) for i in range(10)]
    with pytest.raises(CaptureError, match=rf"must be fp32 is not \(after a test, {domain}\.{op} .*got x{index}"):
        verify_graph(passing_through(domain, op, inputs), "a test")


def test_the_verifier_refuses_a_value_used_before_it_is_made() -> None:
    def two_nodes(order: int) -> ir.Model:
        x, middle, y = value("x"), value("middle"), value("y")
        nodes = [new_node("", "Identity", [x], [middle]), new_node("", "Identity", [middle], [y])]
        return graph_of([x], nodes[::order], [y])

    verify_graph(two_nodes(1), "a test")
    with pytest.raises(CaptureError, match=r"reads a value that is not made before it .*got middle"):
        verify_graph(two_nodes(-1), "a test")


def test_the_verifier_refuses_an_untyped_output() -> None:
    x, y = value("x"), value("y", None)
    with pytest.raises(CaptureError, match=r"input or output has no type .*got y"):
        verify_graph(graph_of([x], [new_node("", "Identity", [x], [y])], [y]), "a test")


def test_the_verifier_refuses_an_output_that_nothing_makes() -> None:
    with pytest.raises(CaptureError, match="a graph output is not made by any node"):
        verify_graph(graph_of([value("x")], [], [value("y")]), "a test")


def test_the_verifier_refuses_two_of_one_name() -> None:
    x, y = value("x"), value("x")
    with pytest.raises(CaptureError, match="the same name or none"):
        verify_graph(graph_of([x], [new_node("", "Identity", [x], [y])], [y]), "a test")


def test_the_verifier_refuses_a_node_that_writes_to_its_input() -> None:
    with pytest.raises(CaptureError, match="a node writes to its input"):
        verify_graph(passing_through("", "index_put_", [value("x")]), "a test")
