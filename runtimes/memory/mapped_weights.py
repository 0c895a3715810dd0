"""Weights of a bundle as mapped files: every graph of the bundle sees the same pages, and loading reads nothing."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable
from math import prod
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from qwen_export.errors import BundleError
from qwen_export.manifest import Manifest, WeightSpec, weights_path
from qwen_export.runtimes.memory.buffers import ELEMENTS

# Element types that only weights have: bits per element, in the order of the elements, the first in the low bits.
_NARROW = {"int4": 4, "uint4": 4, "float4e2m1": 4, "float8e4m3fn": 8}


def weight_bytes(weight: WeightSpec) -> int:
    """Bytes that a weight takes in its file."""
    elements = prod(weight.shape)
    return -(-elements * _NARROW[weight.dtype] // 8) if weight.dtype in _NARROW else elements * ELEMENTS[weight.dtype][0]


class MappedWeights:
    """Read-only views of the weight files of one bundle, inside it or referred to, each mapped once."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self._bundle, self._manifest = bundle, manifest
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = Lock()  # graphs may be opened in threads

    def is_reference(self, weight: WeightSpec) -> bool:
        """Whether the weight is stored in a file outside the bundle."""
        return weight.file in self._manifest.references

    def bytes(self, weight: WeightSpec) -> npt.NDArray[np.uint8]:
        """The memory of one weight. Raises BundleError where its file ends before it."""
        with self._lock:
            if weight.file not in self._maps:
                with weights_path(self._bundle, self._manifest, weight.file).open("rb") as file:
                    self._maps[weight.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped = self._maps[weight.file]
        nbytes = weight_bytes(weight)
        if weight.offset + nbytes > len(mapped):
            raise BundleError(
                "a weight is stored outside its file",
                where=str(self._bundle),
                got=f"{weight.name} in {weight.file}",
                fix="Copy the bundle again, or build it again.",
            )
        return np.frombuffer(mapped, np.uint8, nbytes, weight.offset)

    def release(self, weights: Iterable[WeightSpec]) -> None:
        """Take the pages of these weights out of the process, where the system can: they were read, and will not be read again soon. They
        stay in the system's cache, and can be read again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for weight in weights:
            # Whole pages only: what shares the first or the last one may be in use.
            start = -(-weight.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (weight.offset + weight_bytes(weight)) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                with contextlib.suppress(OSError):
                    self._maps[weight.file].madvise(mmap.MADV_DONTNEED, start, end - start)
