"""Activations of all windows of a text, in files: what passes from layer to layer does not have to fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_TOKENS = 2048
"""Tokens that are in memory at a time."""


class WindowStates:
    """f32[W,T,width] in a file."""

    def __init__(self, path: Path, shape: tuple[int, int, int], *, keep: bool = False) -> None:
        self.values: npt.NDArray[np.float32] = np.memmap(path, np.float32, "r+" if keep and path.exists() else "w+", shape=shape)

    def batches(self) -> Iterator[slice]:
        """Of windows."""
        windows, tokens = self.values.shape[:2]
        step = max(1, _TOKENS // tokens)
        return (slice(start, min(windows, start + step)) for start in range(0, windows, step))

    def read(self, part: slice) -> Tensor:
        return torch.from_numpy(np.array(self.values[part]))

    def write(self, part: slice, values: Tensor) -> None:
        self.values[part] = values.numpy()

    def add(self, part: slice, values: Tensor) -> None:
        self.values[part] += values.numpy()

    @property
    def flat(self) -> npt.NDArray[np.float32]:
        """f32[W*T,width], the same memory."""
        return self.values.reshape(-1, self.values.shape[-1])

    def flush(self) -> None:
        if isinstance(self.values, np.memmap):
            self.values.flush()
