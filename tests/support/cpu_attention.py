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

from qwen_export.graphs.ops.gated_attention_op import gated_attention
from tests.support.plugin_session import plugin_session

Array = npt.NDArray[Any]

EPSILON = 1e-6
# Of the largest value.
TOLERANCE = 5e-6
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
    """A layer and one call of it; `tensors` by the names of the op's inputs."""

    shape: Shape
    tensors: dict[str, Array]

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


def make_case(shape: Shape, lengths: list[int], T: int, *, seed: int = 0, sharp: float = 1.0, spare: int = 3) -> Case:
    """Random inputs; cache rows behind the past are NaN. `sharp` multiplies queries' norm: large for weights near 0 and 1."""
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
    for b, length in enumerate(lengths):
        tensors["k_cache"][b, :, length:] = tensors["v_cache"][b, :, length:] = np.nan
    return Case(shape, tensors)


@cache
def session(library: str, shape: Shape, threads: int = 2) -> ort.InferenceSession:
    """One node with dynamic shapes."""
    given = [helper.make_tensor_value_info(name, TensorProto.INT64 if name == "length" else TensorProto.FLOAT, None) for name in INPUTS]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name, rank in zip(OUTPUTS, (3, 4, 4), strict=True)]
    counts = {"num_heads": shape.Hq, "kv_num_heads": shape.Hkv, "scale": shape.D**-0.5, "epsilon": EPSILON}
    node = helper.make_node("GatedAttention", list(INPUTS), list(OUTPUTS), domain="qwen.native", **counts)
    return plugin_session(library, node, given, made, threads)


def call(library: str, case: Case, threads: int = 2) -> dict[str, Array]:
    made = session(library, case.shape, threads).run(None, case.tensors)
    return dict(zip(OUTPUTS, made, strict=True))


def call_in_place(library: str, case: Case) -> dict[str, Array]:
    """The caches are bound to the same memory as input and output, and y to memory full of NaN."""
    held = {name: ort.OrtValue.ortvalue_from_numpy(value.copy()) for name, value in case.tensors.items()}
    held["y"] = ort.OrtValue.ortvalue_from_numpy(np.full_like(case.tensors["q"], np.nan))
    made = session(library, case.shape)
    binding = made.io_binding()
    for name in case.tensors:
        binding.bind_ortvalue_input(name, held[name])
    places = dict(zip(OUTPUTS, ("y", "k_cache", "v_cache"), strict=True))
    for name, place in places.items():
        binding.bind_ortvalue_output(name, held[place])
    made.run_with_iobinding(binding)
    return {name: held[place].numpy().copy() for name, place in places.items()}


def expected(case: Case) -> dict[str, Array]:
    """The eager op in float64; its norms are zero-centered, and a head's query and gate are neighbors."""
    shape, (B, T, _) = case.shape, case.tensors["q"].shape
    wide = {name: torch.from_numpy(value.astype(np.float64)) for name, value in case.tensors.items() if name != "length"}
    heads = (B, T, shape.Hq, shape.D)
    q_gate = torch.cat([wide["q"].reshape(heads), wide["gate"].reshape(heads)], dim=3).reshape(B, T, -1)
    norms = (wide["q_norm"] - 1, wide["k_norm"] - 1)
    length = torch.from_numpy(case.tensors["length"])
    others = (wide["cos"], wide["sin"], wide["k_cache"], wide["v_cache"], length, shape.Hq, shape.Hkv, EPSILON)
    made = gated_attention(q_gate, wide["k"], wide["v"], *norms, *others)
    return {name: value.numpy() for name, value in zip(OUTPUTS, made, strict=True)}


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
    tolerance = max(TOLERANCE, float(largest) * 2**-22)
    for name in OUTPUTS:
        assert error(got[name], wanted[name]) < tolerance, name
        assert np.array_equal(got[name], together[name], equal_nan=True), f"{name} differs in place"


def check_bits(library: str, shape: Shape, length: int, T: int) -> None:
    """Token by token, in parts of several sizes, and all in one call: the same bits."""
    case = make_case(shape, [length], T, seed=length + T)
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


if __name__ == "__main__":
    check(sys.argv[1])
