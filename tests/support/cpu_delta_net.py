"""DeltaNetTransaction of the CPU plugin against the eager op in float64. A process has one instruction set, so this is also a script:

QWEN_EXPORT_CPU_SET=base python -m tests.support.cpu_delta_net LIBRARY
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

from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from tests.support.plugin_session import plugin_session

Array = npt.NDArray[Any]

EPSILON = 1e-6
# Of the largest value. Sums in fp32 over up to a few hundred tokens.
TOLERANCE = 2e-5
INPUTS = ("qkvz", "ab", "conv_weight", "decay", "dt_bias", "norm", "conv_history", "state")
TRANSACTION = ("pending_qkvz", "pending_ab", "accepted", "commit")
OUTPUTS = ("y", "conv_history_out", "state_out")


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer."""

    Hk: int = 2
    ratio: int = 1
    Dk: int = 16
    Dv: int = 16
    K: int = 4

    @property
    def Hv(self) -> int:  # noqa: N802
        return self.Hk * self.ratio

    @property
    def C(self) -> int:  # noqa: N802
        return 2 * self.Hk * self.Dk + self.Hv * self.Dv


@dataclass(frozen=True)
class Case:
    """A layer and one call of it; `tensors` by the names of the op's inputs."""

    shape: Shape
    tensors: dict[str, Array]

    def replaced(self, **tensors: Array | None) -> Case:
        """The same with other tensors; None leaves one out."""
        merged = {**self.tensors, **tensors}
        return replace(self, tensors={name: value for name, value in merged.items() if value is not None})


def make_case(shape: Shape, B: int, T: int, P: int, accepted: Any, commit: Any, *, seed: int = 0, hard: bool = False) -> Case:
    """Random inputs. `hard`: keys of a head share a direction, betas are near 1, decays from 1 down to e^-40. Pending rows that are not
    accepted are NaN."""
    rng = np.random.default_rng(seed)
    C, V, Hv = shape.C, shape.Hv * shape.Dv, shape.Hv

    def normal(*sizes: int, scale: float = 1.0) -> Array:
        return (rng.normal(size=sizes) * scale).astype(np.float32)

    shared = normal(C, scale=2.0) if hard else normal(C, scale=0.3)
    bias = np.concatenate([normal(Hv, scale=4.0 if hard else 1.0), np.full(Hv, 6.0 if hard else 0.0, np.float32)])

    def packed(tokens: int) -> Array:
        x = normal(B, tokens, C + V)
        x[..., :C] += shared
        return x

    tensors = {
        "qkvz": packed(T),
        "ab": normal(B, T, 2 * Hv) + bias,
        "conv_weight": normal(shape.K, C, scale=0.5),
        "decay": -np.exp(normal(Hv)),
        "dt_bias": normal(Hv),
        "norm": 1 + normal(shape.Dv, scale=0.25),
        "conv_history": normal(B, shape.K - 1, C) + shared,
        "state": normal(B, Hv, shape.Dk, shape.Dv),
    }
    if accepted is not None:
        tensors |= {"pending_qkvz": packed(P), "pending_ab": normal(B, P, 2 * Hv) + bias}
        tensors |= {"accepted": np.array(accepted, np.int64), "commit": np.array(commit, np.int64)}
        for b, kept in enumerate(accepted):
            tensors["pending_qkvz"][b, kept:] = np.nan
            tensors["pending_ab"][b, kept:] = np.nan
    return Case(shape, tensors)


@cache
def session(library: str, key_heads: int, names: tuple[str, ...], threads: int = 2) -> ort.InferenceSession:
    """One node with these inputs and dynamic shapes."""
    given = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name in ("accepted", "commit") else TensorProto.FLOAT, None)
        for name in names
    ]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name, rank in zip(OUTPUTS, (3, 3, 4), strict=True)]
    node = helper.make_node("DeltaNetTransaction", list(names), list(OUTPUTS), domain="qwen.native", key_heads=key_heads, epsilon=EPSILON)
    return plugin_session(library, node, given, made, threads)


def names_of(case: Case) -> tuple[str, ...]:
    return tuple(name for name in (*INPUTS, *TRANSACTION) if name in case.tensors)


def call(library: str, case: Case, threads: int = 2) -> dict[str, Array]:
    made = session(library, case.shape.Hk, names_of(case), threads).run(None, case.tensors)
    return dict(zip(OUTPUTS, made, strict=True))


def call_in_place(library: str, case: Case) -> dict[str, Array]:
    """The states are bound to the same memory as input and output, and y to memory full of NaN."""
    held = {name: ort.OrtValue.ortvalue_from_numpy(value.copy()) for name, value in case.tensors.items()}
    B, T, _ = case.tensors["qkvz"].shape
    held["y"] = ort.OrtValue.ortvalue_from_numpy(np.full((B, T, case.shape.Hv * case.shape.Dv), np.nan, np.float32))
    made = session(library, case.shape.Hk, names_of(case))
    binding = made.io_binding()
    for name in case.tensors:
        binding.bind_ortvalue_input(name, held[name])
    places = dict(zip(OUTPUTS, ("y", "conv_history", "state"), strict=True))
    for name, place in places.items():
        binding.bind_ortvalue_output(name, held[place])
    made.run_with_iobinding(binding)
    return {name: held[place].numpy().copy() for name, place in places.items()}


def expected(case: Case) -> dict[str, Array]:
    """The eager op in float64."""
    tensors, shape = case.tensors, case.shape

    def wide(name: str) -> torch.Tensor:
        return torch.from_numpy(tensors[name].astype(np.float64))

    def parts(prefix: str) -> tuple[torch.Tensor, ...]:
        qkvz, ab = wide(f"{prefix}qkvz"), wide(f"{prefix}ab")
        return qkvz[..., : shape.C], qkvz[..., shape.C :], ab[..., shape.Hv :], ab[..., : shape.Hv]

    qkv, z, b, a = parts("")
    B, T, _ = qkv.shape
    if "accepted" in tensors:
        pending_qkv, _, pending_b, pending_a = parts("pending_")
        counts = (torch.from_numpy(tensors["accepted"]), torch.from_numpy(tensors["commit"]))
    else:
        pending_qkv, pending_b, pending_a = qkv[:, :0], b[:, :0], a[:, :0]
        counts = (torch.zeros(B, dtype=torch.int64), torch.full((B,), T))
    made = gated_delta_net(
        qkv.contiguous(),
        z.contiguous(),
        b.contiguous(),
        a.contiguous(),
        wide("conv_weight").T.contiguous(),
        (-wide("decay")).log(),
        wide("dt_bias"),
        wide("norm"),
        wide("conv_history"),
        wide("state"),
        pending_qkv.contiguous(),
        pending_b.contiguous(),
        pending_a.contiguous(),
        *counts,
        shape.Hk,
        EPSILON,
    )
    return {name: value.numpy() for name, value in zip(OUTPUTS, made, strict=True)}


def specified(case: Case, y: Array) -> Array:
    """y without the rows that nobody may read: those at t >= commit > 0."""
    commit = case.tensors.get("commit")
    if commit is None:
        return y
    return np.concatenate([y[b, : int(n) or None].reshape(-1) for b, n in enumerate(commit)])


def error(got: Array, wanted: Array) -> float:
    if wanted.size == 0:
        return 0.0
    return float(np.abs(got - wanted).max() / max(1e-30, np.abs(wanted).max()))


def check_case(library: str, case: Case, tolerance: float = TOLERANCE) -> None:
    """Right beside float64, and the same bits when the states are updated in place."""
    wanted, got, together = expected(case), call(library, case), call_in_place(library, case)
    history = np.array_equal(got["conv_history_out"], wanted["conv_history_out"].astype(np.float32))
    assert history, "the history is a copy of inputs"
    assert error(specified(case, got["y"]), specified(case, wanted["y"])) < tolerance
    assert error(got["state_out"], wanted["state_out"]) < tolerance
    for name in OUTPUTS:
        assert np.array_equal(got[name], together[name]), f"{name} differs in place"


def check(library: str) -> None:
    """Shapes of heads, lengths of calls and transactions, hard inputs, for the instruction set of this process."""
    shapes = [Shape(), Shape(ratio=3, Dk=20, Dv=12, K=2), Shape(Hk=1, ratio=8, Dk=32, Dv=64, K=3), Shape(ratio=2, Dk=128, Dv=128)]
    for shape in shapes:
        for seed, (T, P, accepted, commit) in enumerate(
            [
                (1, 0, None, None),
                (1, 4, [0, 3], [0, 1]),
                (5, 9, [9, 2], [0, 0]),
                (5, 3, [3, 0], [4, 0]),
                (40, 0, None, None),
                (70, 6, [2, 6], [0, 33]),
            ]
        ):
            check_case(library, make_case(shape, 2 if accepted else 1, T, P, accepted, commit, seed=seed, hard=seed % 2 == 0))
        check_bits(library, shape, 5)


def check_bits(library: str, shape: Shape, tokens: int = 9) -> None:
    """Every way to bring the same tokens to the op gives the same bits: one by one, all in one call, and drafted, partly accepted."""
    case = make_case(shape, 1, tokens, 0, None, None, seed=7)
    qkvz, ab = case.tensors["qkvz"], case.tensors["ab"]
    rows, states = [], [(case.tensors["conv_history"], case.tensors["state"])]
    for t in range(tokens):
        one = call(library, case.replaced(qkvz=qkvz[:, t : t + 1], ab=ab[:, t : t + 1], conv_history=states[t][0], state=states[t][1]))
        rows.append(one["y"])
        states.append((one["conv_history_out"], one["state_out"]))
    one_by_one = np.concatenate(rows, axis=1)
    for kept in range(tokens):
        for done in {0, 1, tokens - kept}:
            # Rows beyond those accepted hold another draft.
            pending = [np.concatenate([x[:, :kept], np.full_like(x[:, :2], np.nan)], axis=1) for x in (qkvz, ab)]
            counts = {"accepted": np.array([kept]), "commit": np.array([done])}
            got = call(
                library,
                case.replaced(qkvz=qkvz[:, kept:], ab=ab[:, kept:], pending_qkvz=pending[0], pending_ab=pending[1], **counts),
            )
            shown = done or tokens - kept
            assert np.array_equal(got["y"][:, :shown], one_by_one[:, kept : kept + shown]), (kept, done)
            history, state = states[kept + done]
            assert np.array_equal(got["conv_history_out"], history), (kept, done)
            assert np.array_equal(got["state_out"], state), (kept, done)


if __name__ == "__main__":
    torch.set_num_threads(1)
    check(sys.argv[1])
