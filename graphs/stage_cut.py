"""A lowered decoder in stages: runs of consecutive layers, each a graph of its own, so that each may be on a device of its own.

The cut is made behind the passes, and each node goes to one stage: a decoder in stages computes what the whole one does, to the last bit.
What a later stage reads of an earlier one is a *link*: the residual stream, and what a fusion made of it (the norm in front of the next
mixer). A link has one name, as output of one stage and as input of others.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common

from qwen_export.errors import REPORT, CaptureError
from qwen_export.graphs.layer_points import OUTPUT, point_name
from qwen_export.graphs.weights.expression import weight_of


def cut_stages(model: ir.Model, starts: Sequence[int]) -> list[ir.Model]:
    """One graph per stage. `starts`: the first layer of each, [0, ...], rising. The first has the embedding, the last the head.

    Nodes that depend on neither weights nor states nor links, such as casts of the lengths, are in every stage that reads them."""
    owners = _Owners(model.graph, starts)
    return [_stage(model, owners, number) for number in range(len(starts))]


class _Owners:
    """Which stage computes what."""

    def __init__(self, graph: ir.Graph, starts: Sequence[int]) -> None:
        self._starts = starts
        self.stages: list[list[str]] = [[] for _ in starts]
        """Names of the outputs of the whole graph, by stage."""
        for value in graph.outputs:
            self.stages[self._stage_of(value.name or "")].append(value.name or "")
        named = {value.name: value for node in graph for value in node.outputs}
        self._free = _free_nodes(graph)
        self._owner: dict[ir.Node, int] = {}
        for number, outputs in enumerate(self.stages):
            wanted = list(outputs)
            if number + 1 < len(starts):
                wanted.append(point_name(starts[number + 1] - 1, OUTPUT))
            for name in wanted:
                if name not in named:
                    raise CaptureError("the lowered graph has lost the stream between two layers", where=name, fix=REPORT)
                self._claim(named[name], number)
        self.links: list[dict[str, int]] = [{} for _ in starts]
        """What each stage reads of earlier ones: name and the stage that computes it."""
        for node, number in self._owner.items():
            for given in node.inputs:
                source = given.producer() if given is not None else None
                if given is not None and source is not None and source not in self._free and self._owner[source] < number:
                    self.links[number][given.name or ""] = self._owner[source]

    def _stage_of(self, output: str) -> int:
        """Results that are no layer's belong to the last stage."""
        parts = output.split(".")
        if parts[0] != "layers":
            return len(self._starts) - 1
        return max(number for number, start in enumerate(self._starts) if start <= int(parts[1]))

    def _claim(self, value: ir.Value, number: int) -> None:
        """Everything that a value needs, and no earlier stage has."""
        waiting = [value.producer()]
        while waiting:
            node = waiting.pop()
            if node is None or node in self._owner or node in self._free:
                continue
            self._owner[node] = number
            waiting += [given.producer() for given in node.inputs if given is not None]


def _free_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that need nothing but controls, tables and small constants."""
    states = {value for value in graph.inputs if (value.name or "").startswith("layers.")}
    free: set[ir.Node] = set()
    for node in graph:
        given = [value for value in node.inputs if value is not None]
        if all(
            value not in states and weight_of(value) is None and (value.producer() is None or value.producer() in free) for value in given
        ):
            free.add(node)
    return free


def _stage(model: ir.Model, owners: _Owners, number: int) -> ir.Model:
    """The stage's part of a copy of the whole."""
    stage = model.clone()
    graph = stage.graph
    named = {value.name: value for node in graph for value in node.outputs}
    for name in owners.links[number]:
        old = named[name]
        if old.shape is None or old.dtype is None:
            raise CaptureError("a value between two stages has no type", where=name, fix=REPORT)
        new = ir.Value(name=name, shape=old.shape, type=old.type)
        old.name = f"{name}.earlier"
        old.replace_all_uses_with(new, replace_graph_outputs=False)
        graph.inputs.append(new)
    read_later = [name for later in owners.links[number + 1 :] for name, source in later.items() if source == number]
    outputs = [named[name] for name in (*owners.stages[number], *dict.fromkeys(read_later))]
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    common.RemoveUnusedNodesPass()(stage)
    common.RemoveUnusedOpsetsPass()(stage)
    unread = [value for value in graph.inputs if not value.uses() and not value.is_graph_output()]
    for value in unread:
        graph.inputs.remove(value)
    return stage
