"""Weights of a bundle as mapped files: every graph of the bundle sees the same pages, and loading reads nothing."""

from __future__ import annotations

import mmap
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwen_export.manifest import WeightSpec, file_path
from qwen_export.runtimes.buffers import ELEMENTS


class MappedWeights:
    """Read-only views of the weight files of one bundle, each mapped once."""

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        self._maps: dict[str, mmap.mmap] = {}

    def bytes(self, weight: WeightSpec) -> npt.NDArray[np.uint8]:
        """The memory of one weight."""
        if weight.file not in self._maps:
            with file_path(self._bundle, weight.file).open("rb") as file:
                self._maps[weight.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        nbytes = prod(weight.shape) * ELEMENTS[weight.dtype][0]
        return np.frombuffer(self._maps[weight.file], np.uint8, nbytes, weight.offset)
