"""The vision tower at run time: pictures in, rows that stand for their tokens out, kept by digest."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from qwen_export.bundle_contract import FEATURES, VISION_INPUTS
from qwen_export.manifest import VisionSpec
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.decoding.stop_signal import StopSignal
from qwen_export.runtimes.memory.buffers import Buffer, as_bytes
from qwen_export.runtimes.vision.patch_positions import patch_positions
from qwen_export.runtimes.vision.picture import Picture

KEPT_BYTES = 256 << 20
"""Of features that are kept for pictures that come again, as all pictures of a conversation do in each of its turns."""
_CALL_PATCHES = 16384
"""Slices of a video share a call up to so many patches: more of them cost memory, and are not faster."""

Features = npt.NDArray[np.generic]


class VisionEncoder:
    """Over the graph `vision` of a bundle. May be shared by threads."""

    def __init__(self, session: Session, spec: VisionSpec, kept_bytes: int = KEPT_BYTES) -> None:
        self.session, self.spec, self._limit = session, spec, kept_bytes
        self._kept: OrderedDict[bytes, Features] = OrderedDict()
        self._bytes = 0
        self._lock, self._tower = threading.Lock(), threading.Lock()
        output = next(tensor for tensor in session.spec.outputs if tensor.name == FEATURES)
        self._dtype, self._width = output.dtype, int(output.shape[-1])
        self.encoded = 0
        """Pictures and videos that the tower has read so far."""

    def features(self, picture: Picture, stop: StopSignal | None = None) -> Features:
        """[tokens, H] in the type of the graph, slice after slice; 16-bit types as their bits. One picture is encoded at a time; those
        that are kept do not wait for it. Raises where `stop` is given before the end."""
        kept = self._find(picture)
        if kept is not None:
            return kept
        with self._tower:
            kept = self._find(picture)  # another thread may have wanted the same
            if kept is not None:
                return kept
            made = self._encoded(picture, stop or StopSignal())
            with self._lock:
                self.encoded += 1
                self._kept[picture.digest] = made
                self._bytes += made.nbytes
                while self._bytes > self._limit and len(self._kept) > 1:
                    _, old = self._kept.popitem(last=False)
                    self._bytes -= old.nbytes
            return made

    def _find(self, picture: Picture) -> Features | None:
        with self._lock:
            kept = self._kept.get(picture.digest)
            if kept is not None:
                self._kept.move_to_end(picture.digest)
            return kept

    def _encoded(self, picture: Picture, stop: StopSignal) -> Features:
        spec, grid = self.spec, picture.grid
        M, K = spec.merge_size**2, grid.tokens(spec.merge_size)
        positions = patch_positions(grid.rows, grid.columns, spec)
        at_once, parts = max(1, _CALL_PATCHES // (K * M)), []
        for start in range(0, grid.slices, at_once):
            rows = picture.rows(spec, start, at_once)
            inputs = {VISION_INPUTS[0]: rows.reshape(len(rows), K, M, -1), **positions}
            parts.append(self._call(inputs, (len(rows), K, self._width), stop).reshape(-1, self._width))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _call(self, inputs: dict[str, npt.NDArray[np.generic]], shape: tuple[int, ...], stop: StopSignal) -> Features:
        """Every picture may have a size of its own, so that nothing is kept from call to call."""
        call, memory = self.session.call(repeated=False), list[Buffer]()
        for spec in self.session.spec.inputs:
            array = inputs[spec.name]
            buffer = self.session.buffer(spec.dtype, array.shape)
            buffer.write(as_bytes(array))
            call.bind_input(spec.name, buffer)
            memory.append(buffer)
        output = self.session.buffer(self._dtype, shape)
        call.bind_output(FEATURES, output)
        with stop.ends(call.stop):
            call.run()
        made = output.read()
        return (made.view(np.float32) if self._dtype == "float" else made.view(np.uint16)).reshape(shape)
