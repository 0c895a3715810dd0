"""Memory for features of pictures, which calls of decoder and draft head read instead of embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qwen_export.bundle_contract import FEATURES
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.memory.buffers import Buffer, as_bytes


def features_memory(session: Session, rows: int) -> Buffer | None:
    """For at most so many tokens per call; None where the graph reads text only."""
    spec = next((tensor for tensor in session.spec.inputs if tensor.name == FEATURES), None)
    return session.shared(spec.dtype, (rows, int(spec.shape[-1]))) if spec is not None else None


def rows_of(memory: Buffer, count: int) -> Buffer:
    """The first `count` rows, which may be none."""
    return memory.part(memory.dtype, (count, memory.shape[1]))


class PlacedFeatures:
    """The inputs of a graph with fixed shapes: `features` [T,H], a row for each token of a call; `places` i32[T], which of them count."""

    def __init__(self, features: Buffer, places: Buffer) -> None:
        self._features, self._places = features, places
        self._placed: Sequence[int] = ()

    def place(self, features: Sequence[npt.NDArray[np.generic]], places: Sequence[int]) -> None:
        """For the next call; `features` has a row for each of `places`."""
        T = self._places.shape[0]
        if places:
            rows = np.zeros((T, self._features.nbytes // T), np.uint8)
            for place, row in zip(places, features, strict=True):
                rows[place] = as_bytes(np.ascontiguousarray(row))
            self._features.write(rows.reshape(-1))
        if list(places) != list(self._placed):
            self._places.write(as_bytes(np.isin(np.arange(T), list(places)).astype(np.int32)))
            self._placed = list(places)
