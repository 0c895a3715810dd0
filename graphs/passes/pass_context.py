"""What every pass is given beside the graph, and small helpers to build nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from qwen_export.element_types import BY_SHORT
from qwen_export.graphs.call_sizes import CallSizes
from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.passes.lowering_choice import Choice
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.quantization.precision_plan import GroupFormat, PrecisionPlan
from qwen_export.graphs.weights.expression import Weight

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class PassContext:
    """Facts a pass may decide on. `choices` maps each op of domain qwen to the lowering chosen for the target, `stored` each tensor of the
    checkpoint, by the name of its parameter, to the dtype it is stored in (BF16, F16, F32). `precision` is that of the activations;
    `quantization` is the precision plan, None without one. With `speculation` calls may leave tokens pending. `sizes` are those of a
    graph with static shapes, `opset` its version. `draft_vocab`: rows of the LM head that the draft head reads too, 0 for none.
    `stage_starts`: the first layer of each stage that the graph will be cut into."""

    config: TextConfig
    precision: str
    choices: dict[str, Choice]
    stored: Mapping[str, str] = field(default_factory=dict)
    speculation: bool = False
    quantization: PrecisionPlan | None = None
    sizes: CallSizes | None = None
    opset: int = 21
    draft_vocab: int = 0
    stage_starts: tuple[int, ...] = ()

    @property
    def static(self) -> CallSizes:
        """The sizes, in passes of targets that have static shapes only."""
        if self.sizes is None:
            raise TypeError("this target's graphs have static shapes, and no sizes were given")
        return self.sizes

    def format_of(self, weight: Weight) -> GroupFormat:
        """The format that the precision plan gives to a matrix; "stored" where there is no plan. Raises ConfigError where the plan gives
        its parts different ones."""
        return GroupFormat() if self.quantization is None else self.quantization.of_weight(weight)

    @property
    def activation(self) -> ir.DataType:
        return ir.DataType[BY_SHORT[self.precision].onnx]


Pass = Callable[[ir.Model, PassContext], Outcome]
"""A rewrite in place. Its docstring gives the IR before and after."""


def new_node(
    domain: str,
    op: str,
    inputs: Sequence[ir.Value | None],
    outputs: Sequence[ir.Value] | int = 1,
    *,
    dtype: ir.DataType | None = None,
    like: ir.Value | None = None,
    **attributes: int | float | str | Sequence[int] | ir.TensorProtocol,
) -> ir.Node:
    """A node with plain attributes. New outputs get `dtype`, or the dtype of `like`."""
    attrs = [
        ir.Attr(k, ir.AttributeType.TENSOR, v) if isinstance(v, ir.TensorProtocol) else ir.convenience.convert_attribute(k, v)
        for k, v in attributes.items()
    ]
    if isinstance(outputs, int):
        node = ir.Node(domain, op, list(inputs), attrs, num_outputs=outputs)
        for value in node.outputs:
            kind = dtype or (like.dtype if like is not None else None)
            value.type = ir.TensorType(kind) if kind is not None else None
        return node
    return ir.Node(domain, op, list(inputs), attrs, outputs=list(outputs))


def replace_node(graph: ir.Graph, old: ir.Node, new: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> None:
    """Replace `old` by `new`; `outputs` take over the uses and names of the old outputs."""
    ir.convenience.replace_nodes_and_values(graph, old, [old], list(new), list(old.outputs), list(outputs))


def sole_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, None when there are more or it is a graph output."""
    users = value.consumers()
    return users[0] if len(users) == 1 and not value.is_graph_output() else None
