"""Calls of the vision tower: one graph for pictures of any size, or one for each of some sizes, which smaller pictures are filled up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qwen_export.bundle_contract import FEATURES, REAL_TOKENS, VISION_INPUTS
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
        self._session = session

    @property
    def largest(self) -> None:
        return None

    def at_once(self, tokens: int, patches: int) -> int:
        return max(1, _CALL_PATCHES // (tokens * patches))

    def run(self, inputs: Inputs, stop: StopSignal) -> Features:
        return _called(self._session, inputs, inputs[VISION_INPUTS[0]].shape[:2], stop)


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


def _called(session: Session, inputs: Inputs, shape: tuple[int, ...], stop: StopSignal) -> Features:
    call, memory = session.call(repeated=False), list[Buffer]()
    for spec in session.spec.inputs:
        array = inputs[spec.name]
        buffer = session.buffer(spec.dtype, array.shape)
        buffer.write(as_bytes(array))
        call.bind_input(spec.name, buffer)
        memory.append(buffer)
    output = next(tensor for tensor in session.spec.outputs if tensor.name == FEATURES)
    whole = (*shape, int(output.shape[-1]))
    made = session.buffer(output.dtype, whole)
    call.bind_output(FEATURES, made)
    with stop.ends(call.stop):
        call.run()
    data = made.read()
    return (data.view(np.float32) if output.dtype == "float" else data.view(np.uint16)).reshape(whole)
