"""The search for scales of `graphs.quantization.scale_search`, and the codes for them, in the CPU plugin: a tenth of numpy's time, and
without the interpreter, so that every thread of a build has a core.

It sums in another order than numpy. Of two ranges whose errors differ only by rounding it may take the other one, so weights that it made
are named after the library that made them. Codes for given scales are numpy's.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qwen_export.graphs.quantization.packing import Bytes, Floats
from qwen_export.plugins.native.native_library import find_library

_LANES = 16


@dataclass(frozen=True)
class NativeSearch:
    """A `ScaleSearch` by two functions of a library. `name` has the hash of the library."""

    name: str
    search: Any = field(compare=False, repr=False)
    make_codes: Any = field(compare=False, repr=False)
    chunk: int = field(default=1 << 18, repr=False)

    def scales(self, w: Floats, shares: Sequence[float], top: float) -> Floats:
        """w f32[n,block] -> f32[n]. Raises ValueError for blocks that are not whole vectors."""
        if w.shape[1] % _LANES:
            raise ValueError(f"a block of {w.shape[1]} values")
        scales = np.empty(len(w), np.float32)
        self.search(w, *w.shape, top, np.asarray(shares, np.float32), len(shares), scales)
        return scales

    def codes(self, w: Floats, inverse: Floats, top: float) -> Bytes:
        codes = np.empty(w.shape, np.uint8)
        self.make_codes(w, *w.shape, inverse, top, codes)
        return codes


def find_search() -> NativeSearch | None:
    """The search of the CPU plugin; None where there is no library, or one without it."""
    path = find_library("cpu")
    return _load(path, path.stat().st_mtime_ns) if path is not None else None


@cache
def _load(path: Path, changed: int) -> NativeSearch | None:
    """`changed` is the time of the file: another file under the same path is another search."""
    try:
        library = ctypes.CDLL(str(path))
        search, make_codes = library.qwen_search_scales, library.qwen_block_codes
    except (OSError, AttributeError):
        return None
    floats, octets = (np.ctypeslib.ndpointer(dtype, flags="C_CONTIGUOUS") for dtype in (np.float32, np.uint8))
    search.argtypes = [floats, ctypes.c_int64, ctypes.c_int64, ctypes.c_float, floats, ctypes.c_int64, floats]
    make_codes.argtypes = [floats, ctypes.c_int64, ctypes.c_int64, floats, ctypes.c_float, octets]
    search.restype = make_codes.restype = None
    return NativeSearch(f"cpu plugin {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}", search, make_codes)
