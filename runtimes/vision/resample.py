"""Bicubic resampling with antialiasing, bit for bit that of torchvision on the CPU, which transformers uses where it is installed.

Keys' kernel with a = -1/2, widened by the scale where a side shrinks; half-pixel centers. Two passes over 8-bit values, first along rows,
then along columns, with an 8-bit picture between them. Weights are fixed point: int16 with as many bits as the largest weight of the pass
allows. Pillow has its own precision and, from release 13 on, an order of passes that depends on the sizes, so it only decodes.

A pass is a product with a band matrix. It is computed block by block with dense products: all terms are integers, and a float holds their
sums exactly, so the order of a product does not matter.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

_MOST_BITS, _LARGEST_WEIGHT = 22, 1 << 15
_EXACT_FP32 = 1 << 24
_BLOCK = 32
"""Results per dense product: more of them multiply more zeros, fewer are more calls."""


class _Band(NamedTuple):
    """The weights of up to _BLOCK results: they read inputs `first` to `last`. `weights` [last-first, results] hold integers."""

    start: int
    stop: int
    first: int
    last: int
    weights: npt.NDArray[Any]


def resized(planes: Pixels, height: int, width: int) -> Pixels:
    """u8[..., H, W] -> u8[..., height, width]. A side that keeps its size is not touched."""
    if planes.shape[-1] != width:
        planes = _pass(planes.reshape(-1, planes.shape[-1]), width).reshape(*planes.shape[:-1], width)
    if planes.shape[-2] != height:
        flat = planes.reshape(-1, *planes.shape[-2:])
        made = np.empty((len(flat), height, planes.shape[-1]), np.uint8)
        for plane, target in zip(flat, made, strict=True):
            _pass(plane.T, height, target.T)
        planes = made.reshape(*planes.shape[:-2], height, planes.shape[-1])
    return planes


def _pass(rows: Pixels, size: int, made: Pixels | None = None) -> Pixels:
    """u8[R, n] -> u8[R, size], along the rows."""
    result = np.empty((len(rows), size), np.uint8) if made is None else made
    bits, bands = _bands(rows.shape[1], size)
    half, scale = float(1 << (bits - 1)), 1.0 / (1 << bits)
    for band in bands:
        sums = rows[:, band.first : band.last].astype(band.weights.dtype) @ band.weights
        sums += half
        sums *= scale
        np.floor(sums, out=sums)
        np.clip(sums, 0, 255, out=sums)
        result[:, band.start : band.stop] = sums
    return result


@lru_cache(maxsize=32)
def _bands(count: int, size: int) -> tuple[int, tuple[_Band, ...]]:
    """Bits behind the point, and the weights of a pass from `count` to `size` values."""
    scale = count / size
    stretch = max(scale, 1.0)
    support = 2 * stretch
    spans: list[tuple[int, npt.NDArray[Any]]] = []
    for i in range(size):
        center = (i + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), count)
        taps = _keys((np.arange(first, last, dtype=np.float64) - center + 0.5) / stretch)
        total = 0.0
        for tap in taps.tolist():  # the reference adds them in order
            total += tap
        spans.append((first, taps / total if total else taps))
    largest = max(float(taps.max()) for _, taps in spans)
    bits = 0
    while bits < _MOST_BITS and int(0.5 + largest * (1 << (bits + 1))) < _LARGEST_WEIGHT:
        bits += 1
    bands = []
    for start in range(0, size, _BLOCK):
        stop = min(size, start + _BLOCK)
        first, last = spans[start][0], max(begin + len(taps) for begin, taps in spans[start:stop])
        weights = np.zeros((last - first, stop - start))
        for column, (begin, taps) in enumerate(spans[start:stop]):
            fixed = taps * (1 << bits)
            weights[begin - first : begin - first + len(taps), column] = np.trunc(fixed + np.where(fixed < 0, -0.5, 0.5))
        # 255 times what a column's weights can add up to, and one half.
        exact = np.abs(weights).sum(axis=0).max() * 255 + (1 << bits) < _EXACT_FP32
        bands.append(_Band(start, stop, first, last, weights.astype(np.float32 if exact else np.float64)))
    return bits, tuple(bands)


def _keys(x: npt.NDArray[np.floating[Any]]) -> npt.NDArray[Any]:
    a, x = -0.5, np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
