"""Graphs of a few nodes that DirectML 1.15.4 or its provider computes wrongly, or does not compile, and their neighbors."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.parser
from onnx import helper

from tests.support.standard_graphs import Array

_HEADER = '<ir_version: 9, opset_import: ["" : 20]> graph '


@dataclass(frozen=True)
class Case:
    """`overwritten`: the values that an elementwise operator writes over before their last reader. With `refused` no session is opened."""

    name: str
    text: str
    overwritten: tuple[str, ...] = ()
    refused: bool = False
    model: onnx.ModelProto = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", onnx.parser.parse_model(_HEADER + self.text))


def feeds_of(model: onnx.ModelProto, seed: int = 0) -> dict[str, Array]:
    """Random values for the inputs of a graph of static shapes, small enough for exp in fp16."""
    rng = np.random.default_rng(seed)
    return {
        value.name: (rng.standard_normal([d.dim_value for d in value.type.tensor_type.shape.dim]) * 0.3).astype(
            helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        )
        for value in model.graph.input
    }


CASES = (
    Case(
        "an output of the graph",
        """(float[4,64] x, float[64,4] w, float[4,4] old) => (float[4,4] p, float[8,4] e)
        { p = MatMul(x, w)  c = Concat<axis = 0>(old, p)  e = Exp(c) }""",
        ("p",),
    ),
    Case(
        "an operator of two inputs",
        """(float[4,64] x, float[64,4] w, float[4,4] old, float[4] k) => (float[4,4] p, float[8,4] e)
        { p = MatMul(x, w)  c = Concat<axis = 0>(old, p)  e = Add(c, k) }""",
        ("p",),
    ),
    Case(
        "another reader",
        """(float[4,64] x, float[64,4] w, float[4,4] old, float[4,8] m) => (float[4,8] f, float[8,4] e)
        { p = MatMul(x, w)  c = Concat<axis = 0>(old, p)  e = Exp(c)  f = MatMul(p, m) }""",
        ("p",),
    ),
    Case(
        "both parts",
        """(float[4,64] x, float[64,4] w, float[64,2] v) => (float[4,4] p, float[4,2] q, float[4,6] e)
        { p = MatMul(x, w)  q = MatMul(x, v)  c = Concat<axis = -1>(q, p)  e = Sigmoid(c) }""",
        ("q", "p"),
    ),
    Case(
        "views of part and result",
        """(float[4,64] x, float[64,4] w, float[1,4,4] old) => (float[4,4] p, float[32] e)
        <int64[3] three = {1, 4, 4}, int64[1] flat = {32}>
        { p = MatMul(x, w)  r = Reshape(p, three)  c = Concat<axis = 1>(old, r)  s = Reshape(c, flat)  e = Exp(s) }""",
        ("r",),
    ),
    Case(
        "a part of a part",
        """(float[4,64] x, float[64,4] w, float[4,4] q, float[1,4,4] r) => (float[4,4] p, float[1,12,4] e)
        <int64[1] zero = {0}>
        { p = MatMul(x, w)  c = Concat<axis = 0>(p, q)  u = Unsqueeze(c, zero)  d = Concat<axis = 1>(u, r)  e = Exp(d) }""",
        ("p",),
    ),
    Case(
        "a reader that the other part is computed from",
        """(float[4,64] x, float[64,4] w) => (float[8,4] e)
        { p = MatMul(x, w)  o = Sigmoid(p)  c = Concat<axis = 0>(o, p)  e = Exp(c) }""",
    ),
    Case(
        "such a reader and a later one",
        """(float[4,64] x, float[64,4] w) => (float[8,4] e, float[4,4] f)
        { p = MatMul(x, w)  o = Sigmoid(p)  c = Concat<axis = 0>(o, p)  e = Exp(c)  f = Tanh(p) }""",
        ("p",),
    ),
    Case(
        "the result is an output",
        """(float[4,64] x, float[64,4] w, float[4,4] old) => (float[4,4] p, float[8,4] c, float[8,4] e)
        { p = MatMul(x, w)  c = Concat<axis = 0>(old, p)  e = Exp(c) }""",
    ),
    Case(
        "two readers of the result",
        """(float[4,64] x, float[64,4] w, float[4,4] old, float[4,8] m) => (float[4,4] p, float[8,4] e, float[8,8] f)
        { p = MatMul(x, w)  c = Concat<axis = 0>(old, p)  e = Exp(c)  f = MatMul(c, m) }""",
    ),
    Case(
        "no elementwise operator",
        """(float[4,64] x, float[64,4] w, float[4,4] old, float[4,8] m) => (float[4,4] p, float[8,8] f)
        { p = MatMul(x, w)  c = Concat<axis = 0>(old, p)  f = MatMul(c, m) }""",
    ),
)


_MATMUL = "(float[6,2] x, float[2,6] w) => (float[4,6] y) <int64[1] a = {2}, int64[1] b = {6}, int64[1] z = {0}> { m = MatMul(x, w) "

SLICED = (
    Case("Slice under an elementwise operator", _MATMUL + "s = Slice(m, a, b, z)  y = Exp(s) }", refused=True),
    Case("Slice under two of them", _MATMUL + "s = Slice(m, a, b, z)  u = Sigmoid(s)  y = Sqrt(u) }", refused=True),
    Case(
        "Split, of which one part is read",
        """(float[6,2] x, float[2,6] w) => (float[2,6] y) <int64[2] sizes = {2, 4}>
        { m = MatMul(x, w)  r, s = Split<axis = 0>(m, sizes)  y = Sigmoid(r) }""",
        refused=True,
    ),
    Case(
        "views between them",
        """(float[6,2] x, float[2,6] w) => (float[4,6] y)
        <int64[1] a = {2}, int64[1] b = {6}, int64[1] o = {1}, int64[1] z = {0}, int64[2] flat = {4, 6}>
        { m = MatMul(x, w)  k = Unsqueeze(m, z)  s = Slice(k, a, b, o)  r = Reshape(s, flat)  y = Tanh(r) }""",
        refused=True,
    ),
    Case(
        "a gate, along the last axis",
        """(float[6,2] x, float[2,6] w) => (float[6,3] y) <int64[2] sizes = {3, 3}>
        { m = MatMul(x, w)  g, u = Split<axis = 1>(m, sizes)  s = Sigmoid(g)  y = Mul(s, u) }""",
        ("g",),
    ),
    Case("two readers of the part", _MATMUL + "s = Slice(m, a, b, z)  u = Sigmoid(s)  y = Mul(s, u) }"),
    Case(
        "another reader of the whole",
        """(float[6,2] x, float[2,6] w) => (float[4,6] y, float[6,6] m) <int64[1] a = {2}, int64[1] b = {6}, int64[1] z = {0}>
        { m = MatMul(x, w)  s = Slice(m, a, b, z)  y = Exp(s) }""",
    ),
    Case(
        "an input of the graph",
        """(float[6,6] m) => (float[4,6] y) <int64[1] a = {2}, int64[1] b = {6}, int64[1] z = {0}>
        { s = Slice(m, a, b, z)  y = Exp(s) }""",
    ),
    Case(
        "Gather",
        """(float[6,2] x, float[2,6] w) => (float[4,6] y) <int32[4] rows = {2, 3, 4, 5}>
        { m = MatMul(x, w)  s = Gather<axis = 0>(m, rows)  y = Exp(s) }""",
    ),
)

_PRODUCT = "(float[4,8] x, float[8,8] w) => (float[4,8] y) { p = Gemm<transB = 1>(x, w) "

FUSED = (
    Case("Gemm without a bias under Sigmoid", _PRODUCT + "y = Sigmoid(p) }", refused=True),
    Case("under Tanh", _PRODUCT + "y = Tanh(p) }", refused=True),
    Case("under Exp", _PRODUCT + "y = Exp(p) }"),
    Case("two readers", _PRODUCT + "s = Sigmoid(p)  y = Mul(p, s) }"),
    Case(
        "a view between them",
        """(float[4,8] x, float[8,8] w) => (float[1,4,8] y) <int64[3] shape = {1, 4, 8}>
        { p = Gemm<transB = 1>(x, w)  r = Reshape(p, shape)  y = Sigmoid(r) }""",
    ),
    Case(
        "with a bias",
        "(float[4,8] x, float[8,8] w, float[8] b) => (float[4,8] y) { p = Gemm<transB = 1>(x, w, b)  y = Sigmoid(p) }",
    ),
    Case("MatMul", "(float[4,8] x, float[8,8] w) => (float[4,8] y) { p = MatMul(x, w)  y = Sigmoid(p) }"),
    Case(
        "a product that is an output",
        "(float[4,8] x, float[8,8] w) => (float[4,8] p, float[4,8] y) { p = MatMul(x, w)  y = Tanh(p) }",
        refused=True,
    ),
    Case(
        "a Transpose that changes nothing",
        "(float[4,8] x, float[8,8] w) => (float[4,8] y) { t = Transpose<perm = [0, 1]>(x)  y = Gemm<transB = 1>(t, w) }",
        refused=True,
    ),
    Case("a Transpose", "(float[8,4] x, float[8,8] w) => (float[4,8] y) { t = Transpose<perm = [1, 0]>(x)  y = Gemm<transB = 1>(t, w) }"),
)
