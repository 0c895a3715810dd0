"""Chains of the CUDA plugin in tests: what a graph computes as terms, and a decoder layer's nodes with random tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import new_node
from qwen_export.graphs.quantization.packing import QuantFormat
from qwen_export.plugins.native.native_library import NATIVE
from tests.support.cuda_ops import Array
from tests.support.quant_ops import random_matrix

Term = int
_NUMBERS: dict[tuple[Any, ...], Term] = {(): 0}
"""Terms by what they are made of: written out, those of a residual stream would be as long as 2 to the number of parts."""
_ABSENT = 0
# How many inputs and outputs of each type the op has, in their order (plugins/native/chain_op.cc).
_INPUTS, _OUTPUTS = (("T", 64), ("b", 24), ("f", 48), ("l", 4)), (("T", 32), ("f", 8))


def _term(*content: Any) -> Term:
    return _NUMBERS.setdefault(content, len(_NUMBERS))


def terms(graph: ir.Graph) -> dict[str, Term]:
    """What each output of the graph is, as the number of a term of ops, attributes and names: two graphs with equal terms compute the same.
    A Chain is read by the text of its wiring, part after part."""
    known: dict[ir.Value | None, Term] = {None: _ABSENT}
    for value in (*graph.inputs, *graph.initializers.values()):
        known[value] = _term(value.name)
    for node in graph:
        given = [known[value] for value in node.inputs]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        made = _chain(attributes, given) if node.op_type == "Chain" else _results(node.op_type, attributes, given, len(node.outputs))
        known |= {value: made[i] for i, value in enumerate(node.outputs) if i in made}
    return {value.name or "": known[value] for value in graph.outputs}


def _results(op: str, attributes: dict[str, Any], given: list[Term], count: int) -> dict[int, Term]:
    while given and given[-1] == _ABSENT:
        given = given[:-1]
    return {i: _term(op, i, tuple(sorted((name, str(value)) for name, value in attributes.items())), *given) for i in range(count)}


def _chain(attributes: dict[str, Any], given: list[Term]) -> dict[int, Term]:
    made: list[Term] = []
    leaving: dict[int, Term] = {}
    for index, part in enumerate(attributes["wiring"].split("; ")):
        head, results = part.split(" > ")
        op, *words = head.split()
        own = {name.removeprefix(f"p{index}_"): value for name, value in attributes.items() if name.startswith(f"p{index}_")}
        read = [_ABSENT if word == "-" else made[int(word[1:])] if word[0] == "v" else given[place(word, _INPUTS)] for word in words]
        assert all(read[i] for i, word in enumerate(words) if word != "-"), "a part reads an input that the node leaves out"
        for i, word in enumerate(results.split()):
            made.append(_results(op, own, read, i + 1)[i])
            if word != "-":
                leaving[place(word, _OUTPUTS)] = made[-1]
    return leaving


def place(word: str, layout: tuple[tuple[str, int], ...]) -> int:
    at = 0
    for kind, count in layout:
        if kind == word[0]:
            assert int(word[1:]) < count
            return at + int(word[1:])
        at += count
    raise AssertionError(word)


_FORMATS = {"int4": QuantFormat(4, 32, False, False), "int8": QuantFormat(8, 32, False, False)}


class LayerNodes:
    """A graph that has the nodes of a DeltaNet layer and the MLP behind it, and the projection of the next: 6 parts of a chain. Everything
    is an input of the graph. `values` are tensors for these, by name, for B sequences of T tokens with P pending ones (none: no
    transaction).

    `kind`: "plain", "int4" or "int8"."""

    HK, HV, D, NEXT, TAIL = 2, 8, 64, 96, 16

    def __init__(self, dtype: str, kind: str, B: int, T: int, P: int | None, *, hidden: int = 128, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._dtype, self._kind, self._hidden = dtype, kind, hidden
        inner = hidden // 2
        self.values: dict[str, tuple[Array, str]] = {}
        self._inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        C, Hv, D = (2 * self.HK + self.HV) * self.D, self.HV, self.D
        wide = C + Hv * D
        x = self._own("x", self._rng.normal(size=(B, T, self._hidden)))
        packed = self._with_tail(x, "in", wide)
        mixer = [
            packed,
            self._own("conv", self._rng.normal(size=(C, 4)) / 2),
            self._input("a_log", self._rng.normal(size=Hv), "float"),
            self._input("dt_bias", self._rng.normal(size=Hv), "float"),
            self._own("norm", 1 + self._rng.normal(size=D) / 4),
            self._own("history", self._rng.normal(size=(B, 3, C))),
            self._input("state", self._rng.normal(size=(B, Hv, D, D)) / 4, "float"),
        ]
        if P is not None:
            mixer += [
                self._own("pending", self._rng.normal(size=(B, P, wide + 2 * Hv))),
                self._input("accepted", np.full(B, P // 2), "int64"),
                self._input("commit", np.full(B, T), "int64"),
            ]
        node = self._node("DeltaNet", mixer, 3, key_heads=self.HK, epsilon=1e-6)
        y, history, state = node.outputs
        history.name, state.name, state.type = "history.next", "state.next", ir.TensorType(ir.DataType.FLOAT)
        mixed = self._product("Linear", y, "out", self._hidden, Hv * D, residual=x)
        product = self._product("SwiGlu", mixed, "gate_up", 2 * inner, self._hidden, norm=True)
        output = self._product("Linear", product, "down", self._hidden, inner, residual=mixed)
        after = self._with_tail(output, "next", self.NEXT - self.TAIL)
        packed.name, output.name, after.name = "pending.next", "output", "after"
        self._outputs = [packed, history, state, output, after]
        for value, shape in zip(self._outputs, self.shapes(B, T).values(), strict=True):
            value.shape = ir.Shape([None] * len(shape))

    def shapes(self, B: int, T: int) -> dict[str, tuple[int, ...]]:
        """Those of the outputs."""
        C, wide = (2 * self.HK + self.HV) * self.D, (2 * self.HK + 2 * self.HV) * self.D + 2 * self.HV
        return {
            "pending.next": (B, T, wide),
            "history.next": (B, 3, C),
            "state.next": (B, self.HV, self.D, self.D),
            "output": (B, T, self._hidden),
            "after": (B, T, self.NEXT),
        }

    def model(self) -> ir.Model:
        graph = ir.Graph(self._inputs, self._outputs, nodes=self._nodes, opset_imports={"": 21, NATIVE: 1}, name="layer")
        return ir.Model(graph, ir_version=10)

    def _input(self, name: str, value: Array, dtype: str) -> ir.Value:
        self.values[name] = (value, dtype)
        made = ir.Value(name=name, type=ir.TensorType(ir.DataType[dtype.upper()]), shape=ir.Shape([None] * value.ndim))
        self._inputs.append(made)
        return made

    def _own(self, name: str, value: Array) -> ir.Value:
        return self._input(name, value, self._dtype)

    def _node(self, op: str, inputs: list[ir.Value | None], outputs: int = 1, **attributes: Any) -> ir.Node:
        node = new_node(NATIVE, op, inputs, outputs, dtype=ir.DataType[self._dtype.upper()], **attributes)
        for i, value in enumerate(node.outputs):
            value.name = f"{op}.{len(self._nodes)}.{i}"
        self._nodes.append(node)
        return node

    def _with_tail(self, x: ir.Value, name: str, N: int) -> ir.Value:
        """A projection in front of a mixer, [N + TAIL]; a quantized one leaves the gates as they are."""
        if self._kind == "plain":
            return self._product("Linear", x, name, N + self.TAIL, self._hidden, norm=True)
        tail = self._own(f"{name}.tail", self._rng.normal(size=(self.TAIL, self._hidden)) / self._hidden**0.5)
        return self._product("Linear", x, name, N, self._hidden, norm=True, tail=tail)

    def _product(
        self,
        op: str,
        x: ir.Value,
        name: str,
        N: int,
        K: int,
        *,
        residual: ir.Value | None = None,
        norm: bool = False,
        tail: ir.Value | None = None,
    ) -> ir.Value:
        more: list[ir.Value | None] = [residual] if op == "Linear" else []
        more.append(self._own(f"{name}.norm", 1 + self._rng.normal(size=K) / 4) if norm else None)
        more.append(tail)
        while more and more[-1] is None:
            more.pop()
        if self._kind == "plain":
            w = self._own(name, self._rng.normal(size=(N, K)) / K**0.5)
            return self._node(op, [x, w, *more], epsilon=1e-6).outputs[0]
        format = _FORMATS[self._kind]
        w = self._input(name, random_matrix(format, N, K)[0], "uint8")
        return self._node(f"Quant{op}", [x, w, *more], epsilon=1e-6, **format.attributes(N, K)).outputs[0]
