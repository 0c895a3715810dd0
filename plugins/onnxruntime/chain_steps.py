"""What a step computes between two attention kernels, as one node: borders between kernels cost it as much as reading the weights does."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir

from qwen_export.bundle_contract import HIDDEN
from qwen_export.graphs.layer_points import OUTPUT, point_name
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.plugins.onnxruntime.chain_node import chain_of, expanded, is_chain, wired
from qwen_export.plugins.onnxruntime.linear_plugin import is_native

LEAST, MOST = 3, 24
"""Parts of a chain."""
_EXPERTS = ("QuantMoe", "Fp8Moe")
# Where each op takes a value that the chain may have made: its x, and the residual.
_FROM_CHAIN = {
    "Linear": (0, 2),
    "SwiGlu": (0,),
    "QuantLinear": (0, 2),
    "QuantSwiGlu": (0,),
    "Fp8Linear": (0, 3),
    "Fp8SwiGlu": (0,),
    "DeltaNet": (0,),
}


def chain_steps(model: ir.Model, context: PassContext) -> Outcome:
    """Given  y1 = QuantLinear(x, w1, residual=s);  y2 = QuantSwiGlu(y1, w2);  y3 = QuantLinear(y2, w3, residual=y1);  ...
           each the x of the next, three or more; products and DeltaNet of qwen.native
    Result y1, y3, ... = qwen.native::Chain(x, s, w1, w2, w3, ...)         outputs are the values that others read

    A chain ends where a stage ends. Routers stay apart: what reads them is no part of a chain. The draft head has none: where it
    runs on a stream of its own, the first stream with a chain keeps others from having any."""
    if "chain" not in context.choices:
        return Outcome.nothing("the backend has no kernel of Chain")
    if any(value.name == HIDDEN for value in model.graph.inputs):
        return Outcome.nothing("the draft head has no chains")
    ends = {point_name(start - 1, OUTPUT) for start in context.stage_starts if start > 0}
    return Outcome(join_chains(model.graph, ends))


def join_chains(graph: ir.Graph, ends: Collection[str] = ()) -> int:
    """Join what can be joined; a chain goes no further than the values of these names. Returns the number of chains."""
    chains = [nodes for nodes in _chains(graph, ends) if len(nodes) >= LEAST]
    for nodes in chains:
        chain, replaced = chain_of(nodes)
        _replace(graph, nodes, [chain], replaced)
    graph.sort()  # what reads a value inside of a chain stood before its last part
    return len(chains)


def expand_chains(graph: ir.Graph) -> int:
    """The graph with the parts of all chains as nodes, as it was before they were joined. Returns the number of chains: a graph without may
    be for a library that has no such op, and is not to be joined again."""
    chains = [node for node in graph if is_chain(node)]
    for chain in chains:
        nodes, replaced = expanded(chain)
        _replace(graph, [chain], nodes, replaced)
    return len(chains)


def _replace(graph: ir.Graph, old: Sequence[ir.Node], new: Sequence[ir.Node], replaced: dict[ir.Value, ir.Value]) -> None:
    ir.convenience.replace_nodes_and_values(graph, old[-1], list(old), list(new), list(replaced), list(replaced.values()))


def _chains(graph: ir.Graph, ends: Collection[str]) -> Iterator[list[ir.Node]]:
    """Runs of parts, each reading what the one before made, that need nothing which other nodes make of their results."""
    chain: list[ir.Node] = []
    later: set[ir.Value] = set()  # made by other nodes of results of the chain
    for node in graph:
        if _is_part(node):
            if not (chain and _follows(node, chain, later)):
                yield chain
                chain, later = [], set()
            chain.append(node)
            if any(value.name in ends for value in node.outputs):
                yield chain
                chain, later = [], set()
        elif any(value is not None and (value in later or value.producer() in chain) for value in node.inputs):
            later.update(node.outputs)
    yield chain


def _is_part(node: ir.Node) -> bool:
    return is_native(node, *_FROM_CHAIN) and not any(is_native(user, *_EXPERTS) for user in node.outputs[0].consumers())


def _follows(node: ir.Node, chain: Sequence[ir.Node], later: Collection[ir.Value]) -> bool:
    if len(chain) == MOST or node.inputs[0] is not chain[-1].outputs[0]:
        return False
    made = {value for part in chain for value in part.outputs}
    firsts = {part.outputs[0] for part in chain}
    for index, value in enumerate(node.inputs):
        if value in later or (value in made and not (value in firsts and index in _FROM_CHAIN[node.op_type])):
            return False
    return wired([*chain, node]) is not None
