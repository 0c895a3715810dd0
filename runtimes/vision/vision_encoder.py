"""The vision tower at run time: pictures in, rows that stand for their tokens out, kept by digest."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from qwen_export.bundle_contract import VISION_INPUTS
from qwen_export.manifest import VisionSpec
from qwen_export.runtimes.decoding.stop_signal import StopSignal
from qwen_export.runtimes.vision.patch_positions import patch_positions
from qwen_export.runtimes.vision.picture import Picture
from qwen_export.runtimes.vision.tower_calls import Features, TowerCalls

KEPT_BYTES = 256 << 20
"""Of features that are kept for pictures that come again, as all pictures of a conversation do in each of its turns."""


class VisionEncoder:
    """Over the tower of a bundle. May be shared by threads."""

    def __init__(self, tower: TowerCalls, spec: VisionSpec, kept_bytes: int = KEPT_BYTES) -> None:
        self.tower, self.spec, self._limit = tower, spec, kept_bytes
        self._kept: OrderedDict[bytes, Features] = OrderedDict()
        self._bytes = 0
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self.encoded = 0
        """Pictures and videos that the tower has read so far."""

    def features(self, picture: Picture, stop: StopSignal | None = None) -> Features:
        """[tokens, H] in the type of the graph, slice after slice; 16-bit types as their bits. One picture is encoded at a time; those
        that are kept do not wait for it. Raises where `stop` is given before the end."""
        kept = self._find(picture)
        if kept is not None:
            return kept
        with self._turn:
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
        at_once, parts = self.tower.at_once(K, M), []
        for start in range(0, grid.slices, at_once):
            rows = picture.rows(spec, start, at_once)
            made = self.tower.run({VISION_INPUTS[0]: rows.reshape(len(rows), K, M, -1), **positions}, stop)
            parts.append(made.reshape(-1, made.shape[-1]))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]
