"""A Chain: one node of the CUDA plugin that stands for several of its nodes, each reading what the one before made.

`chain_of` makes it, `expanded` makes the nodes that it stands for. Names of values that stay inside are an attribute, `values`: where a
checker wants to see one, it has to be found.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import new_node
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.onnxruntime.chain_wiring import (
    ABSENT,
    INPUTS,
    OUTPUTS,
    RESULT,
    Slots,
    WiredPart,
    position,
    read_wiring,
    write_wiring,
)

CHAIN = "Chain"
_WIRING, _VALUES = "wiring", "values"


def leaves(value: ir.Value, inside: Sequence[ir.Node]) -> bool:
    """Whether others want a result of one of these nodes."""
    return value.is_graph_output() or any(user not in inside for user in value.consumers())


def wired(nodes: Sequence[ir.Node]) -> tuple[list[WiredPart], Slots, Slots] | None:
    """How a Chain of these nodes is connected, its inputs and its outputs; None where one node has too few of a type."""
    inputs, outputs = Slots(INPUTS), Slots(OUTPUTS)
    made: dict[ir.Value, int] = {}
    parts = []
    for node in nodes:
        given: list[str] = []
        for value in node.inputs:
            word = ABSENT if value is None else f"{RESULT}{made[value]}" if value in made else inputs.word(value)
            if word is None:
                return None
            given.append(word)
        results: list[str] = []
        for value in node.outputs:
            word = outputs.word(value) if leaves(value, nodes) else ABSENT
            if word is None:
                return None
            results.append(word)
            made[value] = len(made)
        parts.append(WiredPart(node.op_type, tuple(given), tuple(results)))
    return parts, inputs, outputs


def chain_of(nodes: Sequence[ir.Node]) -> tuple[ir.Node, dict[ir.Value, ir.Value]]:
    """The Chain, and its outputs by the values that they replace, with the same names, types and shapes. `wired` must take the nodes."""
    connected = wired(nodes)
    if connected is None:
        raise TypeError("a chain of nodes has more tensors than one node takes")
    parts, inputs, outputs = connected
    values = [value.name or "" for node in nodes for value in node.outputs]
    attributes = [
        ir.Attr(f"p{index}_{attribute.name}", attribute.type, attribute.value)
        for index, node in enumerate(nodes)
        for attribute in node.attributes.values()
    ]
    old = outputs.values()
    chain = new_node(NATIVE, CHAIN, inputs.values(), len(old))
    for attribute in (ir.AttrString(_WIRING, write_wiring(parts)), ir.AttrStrings(_VALUES, values), *attributes):
        chain.attributes[attribute.name] = attribute
    replaced = {}
    for before, after in zip(old, chain.outputs, strict=True):
        if before is None:
            after.name = ""  # an optional output, left out
        else:
            after.name, after.type, after.shape = before.name, before.type, before.shape
            replaced[before] = after
    return chain, replaced


def is_chain(node: ir.Node) -> bool:
    return node.domain == NATIVE and node.op_type == CHAIN


def expanded(chain: ir.Node) -> tuple[list[ir.Node], dict[ir.Value, ir.Value]]:
    """The nodes that a Chain stands for, and which of their results replace its outputs."""
    names = chain.attributes.get_strings(_VALUES)
    own = chain.inputs[0].type if chain.inputs[0] is not None else None
    made: list[ir.Value] = []
    nodes, replaced = [], {}
    for index, part in enumerate(read_wiring(chain.attributes.get_string(_WIRING))):
        given = [_input(chain, word, made) for word in part.inputs]
        prefix = f"p{index}_"
        attributes = [
            ir.Attr(name.removeprefix(prefix), attribute.type, attribute.value)
            for name, attribute in chain.attributes.items()
            if name.startswith(prefix)
        ]
        node = ir.Node(NATIVE, part.op, given, attributes, num_outputs=len(part.results))
        for word, value in zip(part.results, node.outputs, strict=True):
            value.name, value.type = names[len(made)], own
            if word != ABSENT:
                before = chain.outputs[position(word, OUTPUTS)]
                value.type, value.shape = before.type, before.shape
                replaced[before] = value
            made.append(value)
        nodes.append(node)
    return nodes, replaced


def _input(chain: ir.Node, word: str, made: Sequence[ir.Value]) -> ir.Value | None:
    if word == ABSENT:
        return None
    return made[int(word[1:])] if word[0] == RESULT else chain.inputs[position(word, INPUTS)]
