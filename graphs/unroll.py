"""All layers of a decoder from one traced layer of each kind.

Layers of a kind differ in nothing but their parameters and states, so tracing each of 60 layers gives nothing new and takes most of a
build's time. The decoder is traced with one layer per kind; here the nodes of that layer are copied for every layer of its kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qwen_export.errors import REPORT, CaptureError
from qwen_export.graphs.layer_points import EMBEDDING, OUTPUT, READ_BY
from qwen_export.graphs.weights.expression import StoredWeight, add_weight, weight_of

# Where torch.onnx notes the modules that a node comes from.
_SCOPES = "pkg.torch.onnx.name_scopes"


def unroll(model: ir.Model, traced: Sequence[str], layers: Sequence[tuple[str, int]]) -> None:
    """`model` is traced with the layers `traced`, names of modules, one of each kind. Makes it, in place, the model with the layers
    `layers`: the name of each, and the index of its kind in `traced`."""
    graph = model.graph
    templates = [_Template(graph, name) for name in traced]
    stream = templates[0].entry()
    for value in [output for node in graph for output in node.outputs if output.name == EMBEDDING]:
        value.name = f"{EMBEDDING}.table"
    stream.name = EMBEDDING
    last, end = templates[-1].exit(), templates[-1].nodes[-1]
    made: list[ir.Node] = []
    inputs: list[ir.Value] = []
    outputs: list[ir.Value] = []
    for name, kind in layers:
        copy = templates[kind].copy(name, stream)
        made += copy.nodes
        inputs += copy.inputs
        outputs += copy.outputs
        stream = copy.stream
    graph.insert_after(end, made)
    last.replace_all_uses_with(stream)
    own = {value for template in templates for value in (*template.inputs, *template.outputs)}
    for values, new in ((graph.inputs, inputs), (graph.outputs, outputs)):
        kept = [value for value in values if value not in own]
        values.clear()
        values.extend([*kept, *new])
    for template in reversed(templates):
        graph.remove(template.nodes, safe=True)


class _Copy:
    """One layer: its nodes, its states before and after, and the residual stream behind it."""

    def __init__(self, nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value], stream: ir.Value) -> None:
        self.nodes, self.inputs, self.outputs, self.stream = nodes, inputs, outputs, stream


class _Template:
    """The traced layer of this name."""

    def __init__(self, graph: ir.Graph, name: str) -> None:
        self._graph, self._prefix = graph, f"{name}."
        scope = f"'{name}'"
        self.nodes = [node for node in graph if scope in node.metadata_props.get(_SCOPES, "")]
        if not self.nodes:
            raise CaptureError("the trace has no nodes of a layer", where=name, fix=REPORT)
        self._inside = {value for node in self.nodes for value in node.outputs}
        self.inputs = [value for value in graph.inputs if (value.name or "").startswith(self._prefix)]
        self.outputs = [value for value in graph.outputs if (value.name or "").startswith(self._prefix)]
        # Out of the graph at once: the layer that has this index in the end may be of another kind.
        names = [name for name in graph.initializers if name.startswith(self._prefix)]
        self.parameters = [graph.initializers.pop(name) for name in names]

    def entry(self) -> ir.Value:
        """The residual stream that the layer reads: the one computed value from outside."""
        read = {v for node in self.nodes for v in node.inputs if v is not None and v not in self._inside and v.producer() is not None}
        return self._only(read)

    def exit(self) -> ir.Value:
        """The one value that nodes outside the layer read."""
        nodes = set(self.nodes)
        return self._only({v for v in self._inside if any(user not in nodes for user in v.consumers())})

    def points(self) -> dict[str, ir.Value]:
        """The values that keep a name of their own to the end, by `layer_points`."""
        found = {OUTPUT: self.exit()}
        for point, modules in READ_BY.items():
            for module in modules:
                scope = f"'{self._prefix}{module}'"
                nodes = [node for node in self.nodes if scope in node.metadata_props.get(_SCOPES, "")]
                made = {value for node in nodes for value in node.outputs}
                read = {v for node in nodes for v in node.inputs if v is not None and v.producer() is not None} - made
                if nodes:
                    found[point] = self._only(read)
        return found

    def _only(self, values: set[ir.Value]) -> ir.Value:
        if len(values) != 1:
            raise CaptureError(
                "a traced layer is not connected by one residual stream",
                where=self._prefix,
                got=[value.name for value in values],
                fix=REPORT,
            )
        return next(iter(values))

    def copy(self, layer: str, stream: ir.Value) -> _Copy:
        """The nodes once more, for the layer of that name behind `stream`."""
        prefix = f"{layer}."
        new: dict[ir.Value, ir.Value] = {self.entry(): stream}
        for value in self.inputs:
            new[value] = ir.Value(name=self._renamed(value, prefix), shape=value.shape, type=value.type)
        for value in self.parameters:
            new[value] = self._parameter(value, prefix)
        nodes = []
        for node in self.nodes:
            given = [new.get(value, value) if value is not None else None for value in node.inputs]
            copy = ir.Node(node.domain, node.op_type, given, node.attributes.values(), num_outputs=len(node.outputs))
            copy.name = f"{prefix}{node.name}"
            for old, value in zip(node.outputs, copy.outputs, strict=True):
                value.name, value.shape, value.type = self._renamed(old, prefix), old.shape, old.type
                new[old] = value
            nodes.append(copy)
        for point, value in self.points().items():
            new[value].name = f"{layer}.{point}"
        return _Copy(nodes, [new[v] for v in self.inputs], [new[v] for v in self.outputs], new[self.exit()])

    def _renamed(self, value: ir.Value, prefix: str) -> str:
        return prefix + (value.name or "").removeprefix(self._prefix)

    def _parameter(self, value: ir.Value, prefix: str) -> ir.Value:
        """The parameter of that layer; a new initializer of the graph."""
        name, weight = self._renamed(value, prefix), weight_of(value)
        if not isinstance(weight, StoredWeight):
            raise CaptureError("a parameter of a traced layer is not a stored tensor", where=name, fix=REPORT)
        return add_weight(self._graph, name, StoredWeight(name, weight.shape, weight.dtype))
