"""GatedAttention of the CPU plugin against the eager op in float64. A process has one instruction set, so this is also a script:

QWEN_EXPORT_CPU_SET=base python -m tests.support.cpu_attention LIBRARY
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from qwen_export.cache_formats import CACHE_FORMATS
from qwen_export.graphs.ops.cache_rows import CACHE_DTYPES, row_values, stored_rows
from qwen_export.graphs.ops.gated_attention_op import gated_attention
from qwen_export.runtimes.memory.buffers import ELEMENTS
from tests.support.plugin_session import plugin_session

Array = npt.NDArray[Any]

EPSILON = 1e-6
# Of the largest value.
TOLERANCE = 5e-6
# Where caches round, a value that differs in its last bit may become its neighbor on the grid.
ROUNDED = {"fp16": 1e-3, "int8": 1e-2, "fp8": 4e-2}
CACHES = ("k_cache", "v_cache")
INPUTS = ("q", "k", "v", "gate", "q_norm", "k_norm", "cos", "sin", "k_cache", "v_cache", "length")
OUTPUTS = ("y", "k_out", "v_out")


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer."""

    Hkv: int = 2
    group: int = 4
    D: int = 32
    half: int = 8

    @property
    def Hq(self) -> int:  # noqa: N802
        return self.Hkv * self.group


@dataclass(frozen=True)
class Case:
    """A layer and one call of it; `tensors` by the names of the op's inputs. `kept` is the format of the caches: their rows are numbers of
    that type, or bytes where numpy has none."""

    shape: Shape
    tensors: dict[str, Array]
    kept: str = "fp32"

    @property
    def lengths(self) -> list[int]:
        return [int(length) for length in self.tensors["length"]]

    @property
    def T(self) -> int:  # noqa: N802
        return int(self.tensors["q"].shape[1])

    def replaced(self, **tensors: Array) -> Case:
        return replace(self, tensors={**self.tensors, **tensors})

    def row(self, b: int) -> Case:
        """Sequence b alone."""
        own = {name: self.tensors[name][b : b + 1] for name in ("q", "k", "v", "gate", "k_cache", "v_cache", "length")}
        return self.replaced(**own)

    def tokens(self, start: int, stop: int, caches: dict[str, Array]) -> Case:
        """New tokens start .. stop-1, when those before are in the caches."""
        own = {name: self.tensors[name][:, start:stop] for name in ("q", "k", "v", "gate")}
        return self.replaced(**own, length=self.tensors["length"] + start, k_cache=caches["k_out"], v_cache=caches["v_out"])


def make_case(shape: Shape, lengths: list[int], T: int, *, seed: int = 0, sharp: float = 1.0, spare: int = 3, kept: str = "fp32") -> Case:
    """Random inputs; cache rows behind the past are NaN, or full of ones. `sharp` multiplies queries' norm: large for weights near 0 and
    1."""
    rng = np.random.default_rng(seed)
    B, S = len(lengths), max(lengths) + T + spare

    def normal(*sizes: int) -> Array:
        return rng.normal(size=sizes).astype(np.float32)

    angles = np.arange(S)[:, None] * 0.7 ** np.arange(shape.half)
    tensors = {
        "q": normal(B, T, shape.Hq * shape.D),
        "k": normal(B, T, shape.Hkv * shape.D),
        "v": normal(B, T, shape.Hkv * shape.D),
        "gate": 3 * normal(B, T, shape.Hq * shape.D),
        "q_norm": (sharp + normal(shape.D) / 4).astype(np.float32),
        "k_norm": 1 + normal(shape.D) / 4,
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "k_cache": normal(B, shape.Hkv, S, shape.D),
        "v_cache": normal(B, shape.Hkv, S, shape.D),
        "length": np.array(lengths, np.int64),
    }
    for name in CACHES:
        if kept != "fp32":
            rows = stored_rows(torch.from_numpy(tensors[name]), CACHE_DTYPES[kept])
            tensors[name] = (rows.view(torch.uint8) if kept == "fp8" else rows).numpy().copy()
        for b, length in enumerate(lengths):
            tensors[name].view(np.uint8)[b, :, length:] = 0xFF
    return Case(shape, tensors, kept)


@cache
def session(library: str, shape: Shape, threads: int = 2, kept: str = "fp32") -> ort.InferenceSession:
    """One node with dynamic shapes."""
    element = ELEMENTS[CACHE_FORMATS[kept].element.manifest][1]
    kinds = dict.fromkeys((*CACHES, "k_out", "v_out"), element) | {"length": TensorProto.INT64}
    given = [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name in INPUTS]
    ranks = zip(OUTPUTS, (3, 4, 4), strict=True)
    made = [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), [None] * rank) for name, rank in ranks]
    counts = {"num_heads": shape.Hq, "kv_num_heads": shape.Hkv, "scale": shape.D**-0.5, "epsilon": EPSILON}
    node = helper.make_node("GatedAttention", list(INPUTS), list(OUTPUTS), domain="qwen.native", **counts)
    return plugin_session(library, node, given, made, threads)


def call(library: str, case: Case, threads: int = 2) -> dict[str, Array]:
    outputs = {"y": np.empty_like(case.tensors["q"])} | {name: np.empty_like(case.tensors["k_cache"]) for name in ("k_out", "v_out")}
    return _run(library, case, case.tensors, outputs, threads)


def call_in_place(library: str, case: Case) -> dict[str, Array]:
    """The caches are bound to the same memory as input and output, and y to memory full of NaN."""
    held = {name: value.copy() for name, value in case.tensors.items()}
    outputs = {"y": np.full_like(case.tensors["q"], np.nan), "k_out": held["k_cache"], "v_out": held["v_cache"]}
    return _run(library, case, held, outputs, 2)


def _run(library: str, case: Case, inputs: dict[str, Array], outputs: dict[str, Array], threads: int) -> dict[str, Array]:
    made = session(library, case.shape, threads, case.kept)
    binding, given = made.io_binding(), {name: np.ascontiguousarray(value) for name, value in inputs.items()}
    for name, value in given.items():
        binding.bind_input(name, "cpu", 0, _element(case, name), value.shape, value.ctypes.data)
    for name, value in outputs.items():
        binding.bind_output(name, "cpu", 0, _element(case, name), value.shape, value.ctypes.data)
    made.run_with_iobinding(binding)
    return outputs


def _element(case: Case, name: str) -> int:
    if name in (*CACHES, "k_out", "v_out"):
        return ELEMENTS[CACHE_FORMATS[case.kept].element.manifest][1]
    return int(TensorProto.INT64 if name == "length" else TensorProto.FLOAT)


def expected(case: Case) -> dict[str, Array]:
    """The eager op in float64; its norms are zero-centered, and a head's query and gate are neighbors."""
    shape, (B, T, _) = case.shape, case.tensors["q"].shape
    floats = {name: value for name, value in case.tensors.items() if name not in ("length", *CACHES)}
    wide = {name: torch.from_numpy(value.astype(np.float64)) for name, value in floats.items()}
    for name in CACHES:
        rows = torch.from_numpy(case.tensors[name].copy())
        wide[name] = rows.double() if case.kept == "fp32" else rows.view(CACHE_DTYPES[case.kept])
    heads = (B, T, shape.Hq, shape.D)
    q_gate = torch.cat([wide["q"].reshape(heads), wide["gate"].reshape(heads)], dim=3).reshape(B, T, -1)
    norms = (wide["q_norm"] - 1, wide["k_norm"] - 1)
    length = torch.from_numpy(case.tensors["length"])
    others = (wide["cos"], wide["sin"], wide["k_cache"], wide["v_cache"], length, shape.Hq, shape.Hkv, EPSILON)
    made = gated_attention(q_gate, wide["k"], wide["v"], *norms, *others)
    rows = [
        value if case.kept == "fp32" else value.view(torch.uint8).view(torch.from_numpy(case.tensors["k_cache"]).dtype)
        for value in made[1:]
    ]
    return {name: value.numpy() for name, value in zip(OUTPUTS, (made[0], *rows), strict=True)}


def error(got: Array, wanted: Array) -> float:
    """Of the entries that are numbers; the others must be the same."""
    known = ~np.isnan(wanted)
    assert np.array_equal(known, ~np.isnan(got)), "rows that no token has written changed"
    return float(np.abs(got[known] - wanted[known]).max() / np.abs(wanted[known]).max())


def check_case(library: str, case: Case) -> None:
    """Right beside float64, and the same bits when the caches are updated in place."""
    wanted, got, together = expected(case), call(library, case), call_in_place(library, case)
    # A score s that is rounded in fp32 changes the weight of its key by up to s * 2^-24, and is the sum of D such products.
    largest = np.sqrt(case.shape.D) * np.abs(case.tensors["q_norm"]).max() * np.abs(case.tensors["k_norm"]).max()
    tolerance = max(TOLERANCE, float(largest) * 2**-22, ROUNDED.get(case.kept, 0.0))
    for name in OUTPUTS:
        assert np.array_equal(got[name], together[name], equal_nan=True), f"{name} differs in place"
        if case.kept == "fp32" or name == "y":
            assert error(got[name], wanted[name]) < tolerance, name
        else:
            check_rows(case, got[name], wanted[name])


def check_rows(case: Case, got: Array, wanted: Array) -> None:
    """Rows of a cache that rounds: nearly all are those of the eager op, the others are neighbors; rows of no token are unchanged."""
    for b, length in enumerate(case.lengths):
        end = length + case.T
        assert (got.view(np.uint8)[b, :, end:] == 0xFF).all()
        pair = [
            row_values(torch.from_numpy(x[b, :, :end].copy()).view(CACHE_DTYPES[case.kept]), case.shape.D, torch.float64)
            for x in (got, wanted)
        ]
        far = (pair[0] - pair[1]).abs() > 1e-5 * pair[1].abs().amax()
        assert far.double().mean() < 0.01, "many values of the cache are others"
        assert float((pair[0] - pair[1]).abs().max()) < 0.13 * float(pair[1].abs().max())


def check_bits(library: str, shape: Shape, length: int, T: int, kept: str = "fp32") -> None:
    """Token by token, in parts of several sizes, and all in one call: the same bits."""
    case = make_case(shape, [length], T, seed=length + T, kept=kept)
    whole = call(library, case)
    for size in sorted({1, 3, 5, max(1, T // 2)}):
        caches = {"k_out": case.tensors["k_cache"], "v_out": case.tensors["v_cache"]}
        rows = []
        for start in range(0, T, size):
            caches = call(library, case.tokens(start, min(T, start + size), caches))
            rows.append(caches["y"])
        assert np.array_equal(np.concatenate(rows, axis=1), whole["y"]), size
        for name in ("k_out", "v_out"):
            assert np.array_equal(caches[name], whole[name], equal_nan=True), (name, size)


SHAPES = (
    Shape(),
    Shape(Hkv=1, group=1, D=8, half=2),
    Shape(Hkv=3, group=5, D=20, half=7),
    Shape(Hkv=1, group=8, D=64, half=32),
    Shape(Hkv=2, group=6, D=128, half=16),
    Shape(Hkv=1, group=60, D=16, half=4),
)


def check(library: str) -> None:
    """Shapes of heads, lengths of pasts and calls, for the instruction set of this process."""
    for shape in SHAPES:
        for seed, (lengths, T) in enumerate([([0], 1), ([5, 0, 300], 1), ([0, 17], 40), ([255, 256, 250], 9), ([600], 70)]):
            check_case(library, make_case(shape, lengths, T, seed=seed, sharp=1.0 + 20 * (seed % 2)))
        check_bits(library, shape, 250, 12)
    for kept in ROUNDED:
        for seed, (lengths, T) in enumerate([([5, 0, 300], 1), ([0, 17], 40), ([255, 256, 250], 9)]):
            check_case(library, make_case(SHAPES[2 + seed], lengths, T, seed=seed, kept=kept))
        check_bits(library, SHAPES[2], 250, 12, kept)


if __name__ == "__main__":
    check(sys.argv[1])
