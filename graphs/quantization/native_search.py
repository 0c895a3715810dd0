"""The search for scales of quantization.methods in the CPU plugin, where that is built: a tenth of numpy's time.

Its sums have another order than numpy's. So of two ranges that leave the same error but for rounding, the other one may be taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from qwen_export.graphs.quantization.packing import Floats
from qwen_export.plugins.native.native_library import find_library

Search = Callable[[Floats, Sequence[float], float], Floats]
_LANES = 16


def native_search() -> Search | None:
    """The function (w f32[n,block], shares of the range, top) -> scales f32[n]; None where there is no library, or an older one."""
    path = find_library("cpu")
    return _load(path) if path is not None else None


@cache
def _load(path: Path) -> Search | None:
    try:
        function = ctypes.CDLL(str(path)).qwen_search_scales
    except (OSError, AttributeError):
        return None
    floats = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
    function.argtypes = [floats, ctypes.c_int64, ctypes.c_int64, ctypes.c_float, floats, ctypes.c_int64, floats]
    function.restype = None

    def search(w: Floats, shares: Sequence[float], top: float) -> Floats:
        if w.shape[1] % _LANES:
            raise ValueError(f"a block of {w.shape[1]} values")
        scales = np.empty(len(w), np.float32)
        function(w, *w.shape, top, np.asarray(shares, np.float32), len(shares), scales)
        return scales

    return search
