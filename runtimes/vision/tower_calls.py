"""Calls of the vision tower: one graph for pictures of any size, or one for each of some sizes, which smaller pictures are filled up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qwen_export.bundle_contract import REAL_TOKENS, VISION_INPUTS
from qwen_export.errors import BundleError
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.decoding.stop_signal import StopSignal
from qwen_export.runtimes.memory.buffers import Buffer, as_bytes

_CALL_PATCHES = 16384
"""Slices of a video share a call up to so many patches: more of them cost memory, and are not faster."""

Features = npt.NDArray[np.generic]
Inputs = Mapping[str, npt.NDArray[np.generic]]


class TowerCalls(Protocol):
    @property
    def largest(self) -> int | None:
        """Tokens of the largest slice that the tower reads, None where there is no limit."""

    def at_once(self, tokens: int, patches: int) -> int:
        """How many slices, of so many tokens of so many patches each, a call reads."""

    def run(self, inputs: Inputs, stop: StopSignal) -> Features:
        """The inputs of graph `vision`, of some slices of one size -> features [B,K,H]; 16-bit types as their bits."""


def tower_calls(sessions: Sequence[Session]) -> TowerCalls:
    sizes = [
        int(spec.shape[1]) for session in sessions for spec in session.spec.inputs if spec.name == VISION_INPUTS[0] and spec.shape[1] != "K"
    ]
    return FixedTower(dict(zip(sizes, sessions, strict=True))) if sizes else FreeTower(sessions[0])


class FreeTower:
    """Over the graph `vision`. Every picture may have a size of its own, so that nothing is kept from call to call."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @property
    def largest(self) -> None:
        return None

    def at_once(self, tokens: int, patches: int) -> int:
        return max(1, _CALL_PATCHES // (tokens * patches))

    def run(self, inputs: Inputs, stop: StopSignal) -> Features:
        return _called(self.session, inputs, inputs[VISION_INPUTS[0]].shape[:2], stop)


class FixedTower:
    """Over graphs for one slice of a fixed number of tokens, by that number. Patches that fill one up are zeros, and nothing sees them."""

    def __init__(self, sessions: Mapping[int, Session]) -> None:
        self._sessions = dict(sorted(sessions.items()))

    @property
    def largest(self) -> int:
        return max(self._sessions)

    def at_once(self, tokens: int, patches: int) -> int:
        return 1

    def run(self, inputs: Inputs, stop: StopSignal) -> Features:
        tokens = inputs[VISION_INPUTS[0]].shape[1]
        size = next(size for size in self._sessions if size >= tokens)
        return _called(self._sessions[size], filled_inputs(inputs, size), (1, size), stop)[:, :tokens]


def filled_inputs(inputs: Inputs, size: int) -> dict[str, npt.NDArray[np.generic]]:
    """The inputs of a slice as those of the graph for `size` tokens."""
    rows, *tables = VISION_INPUTS
    filled: dict[str, npt.NDArray[np.generic]] = {name: _filled(inputs[name], 0, size) for name in tables}
    return filled | {rows: _filled(inputs[rows], 1, size), REAL_TOKENS: np.array([inputs[rows].shape[1]], np.int32)}


def _filled(values: npt.NDArray[np.generic], axis: int, size: int) -> npt.NDArray[np.generic]:
    """With zeros behind, up to `size` entries of an axis."""
    more = [(0, 0)] * values.ndim
    more[axis] = (0, size - values.shape[axis])
    return np.pad(values, more)


class BoundCall:
    """A call of a graph with memory of its own for inputs and outputs. `shapes`: of its outputs, which are `made`."""

    def __init__(self, session: Session, inputs: Inputs, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.call = session.call(repeated=False)
        self._read = list[Buffer]()  # bindings hold addresses only
        for spec in session.spec.inputs:
            array = inputs[spec.name]
            buffer = session.buffer(spec.dtype, array.shape)
            buffer.write(as_bytes(array))
            self.call.bind_input(spec.name, buffer)
            self._read.append(buffer)
        self.made = {spec.name: session.buffer(spec.dtype, shapes[spec.name]) for spec in session.spec.outputs}
        for name, buffer in self.made.items():
            self.call.bind_output(name, buffer)


def run_once(session: Session, inputs: Inputs, shapes: Mapping[str, tuple[int, ...]], stop: StopSignal | None = None) -> dict[str, Buffer]:
    """A call that does not come again. `shapes`: of its outputs, which are returned."""
    bound = BoundCall(session, inputs, shapes)
    with (stop or StopSignal()).ends(bound.call.stop):
        bound.call.run()
    return bound.made


def _called(session: Session, inputs: Inputs, shape: tuple[int, ...], stop: StopSignal) -> Features:
    [output] = session.spec.outputs
    whole = (*shape, int(output.shape[-1]))
    data = run_once(session, inputs, {output.name: whole}, stop)[output.name].read()
    features = (data.view(np.float32) if output.dtype == "float" else data.view(np.uint16)).reshape(whole)
    if not _finite(features, output.dtype):
        raise BundleError(
            "the vision tower made values that are not finite of a picture",
            got=f"{shape[1]} tokens in {output.dtype}",
            expected="finite values",
            fix="Build in bf16 or fp32: the largest value of fp16 is 65504. `qwen-export verify --per-layer` shows where it is passed.",
        )
    return features


_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}
"""All ones in values that are not finite."""


def _finite(features: Features, dtype: str) -> bool:
    if dtype == "float":
        return bool(np.isfinite(features).all())
    exponent = np.uint16(_EXPONENTS[dtype])
    return not ((features.view(np.uint16) & exponent) == exponent).any()
