"""Nodes that ONNX Runtime joins for DirectML into a node that cannot run, or whose result is lost.

Before DirectML sees a graph, the provider makes one node of a product and the activation that alone reads it, and one of a Transpose and
the Gemm behind it. Found by running random graphs with onnxruntime-directml 1.24.4 (tests/directml):

* Gemm without a bias, then an activation: the joined node must have three inputs, and the session is not opened.
* A product that is an output of the graph, then an activation: the output is never written, and reading it ends the process.
* A Transpose that changes nothing, then Gemm: taken for the transposition of a matrix, and the session is not opened.

Our graphs have none of these, because a Reshape is behind each of their Gemm; so they are refused, and not rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ACTIVATIONS = frozenset(
    {"Elu", "HardSigmoid", "LeakyRelu", "PRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Tanh", "ThresholdedRelu"}
)
"""The activations that the provider joins with a product; of these Sigmoid, Softplus and Tanh were run."""
_BIAS = 2


def broken_fusions(graph: ir.Graph) -> Iterator[tuple[ir.Node, str]]:
    """Every node that the provider would join wrongly, with the reason."""
    for node in graph:
        readers = {reader.op_type: reader for reader in node.outputs[0].consumers() if not reader.domain} if not node.domain else {}
        if len(node.outputs[0].uses()) != 1 or not readers:
            continue
        (reader,) = readers
        if node.op_type in PRODUCTS and reader in ACTIVATIONS:
            if node.outputs[0].is_graph_output():
                yield node, f"the provider joins it with {reader}, and the output {node.outputs[0].name} is never written"
            elif node.op_type == "Gemm" and (len(node.inputs) <= _BIAS or node.inputs[_BIAS] is None):
                yield node, f"the provider joins it with {reader}, for which it needs a bias"
        if node.op_type == "Transpose" and reader == "Gemm" and list(node.attributes.get_ints("perm", [])) == [0, 1]:
            yield node, "it changes nothing, and the provider takes it for a transposition"
