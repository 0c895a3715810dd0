"""Seeded changes of an ONNX file: of its bytes, and of nodes, attributes, names and the places of weights."""

from __future__ import annotations

import random

import onnx

from tests.support.manifest_mutations import damaged

_NUMBERS = (0, 1, -1, 2, 3, 7, 64, 2**31 - 1, -(2**31), 2**40)


def changed_graph(data: bytes, seed: int) -> bytes:
    rng = random.Random(seed)
    if rng.random() < 0.3:
        return damaged(data, seed)
    model = onnx.load_from_string(data)
    for _ in range(rng.choice((1, 1, 2))):
        _change(model.graph, rng)
    return bytes(model.SerializeToString())


def _change(graph: onnx.GraphProto, rng: random.Random) -> None:
    node = rng.choice(graph.node)
    match rng.randrange(9):
        case 0:
            node.op_type = rng.choice([other.op_type for other in graph.node] + ["", "Nothing", "Loop"])
        case 1 if node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.i, attribute.f = rng.choice(_NUMBERS), rng.choice((0.0, -1.0, 1e30, float("nan")))
        case 2 if node.attribute:
            del node.attribute[rng.randrange(len(node.attribute))]
        case 3 if node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice([name for other in graph.node for name in other.output])
        case 4 if node.input:
            del node.input[-1]
        case 5:
            graph.node.remove(node)
        case 6:
            weight = rng.choice(graph.initializer)
            weight.dims[:] = [rng.choice((*_NUMBERS, *weight.dims)) for _ in range(rng.choice((0, 1, len(weight.dims))))]
        case 7:
            weight = rng.choice([weight for weight in graph.initializer if weight.external_data] or list(graph.initializer))
            for entry in weight.external_data:
                if rng.random() < 0.5:
                    entry.value = rng.choice(("0", "-1", "1", str(2**40), str(2**63), "x", "../model.weights", "/etc/passwd"))
        case 8:
            value = rng.choice([*graph.input, *graph.output])
            value.type.tensor_type.elem_type = rng.choice((1, 7, 10, 11, 999))
