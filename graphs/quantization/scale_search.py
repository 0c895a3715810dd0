"""How codes, scales and zeros are found for a block of weights, from the weights alone.

For given codes q the scale that minimizes sum (w - s q)^2 is s = <w,q> / <q,q>, and the error that remains is sum w^2 - <w,q>^2 / <q,q>.
The method "search" tries several ranges per block, takes the codes of each, and keeps those whose best scale leaves the least error. The
caller chooses who searches: numpy, or a compiled library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from qwen_export.errors import CheckpointError
from qwen_export.graphs.quantization.packing import Array, Bytes, Floats, QuantFormat

METHODS = ("rtn", "search")
# Ranges as a share of the one that ends at the largest value. Smaller ones clip the largest value to represent the others better. Rounding
# to nearest is tried too: "search" is never worse.
_SHARES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)


class ScaleSearch(Protocol):
    """Who searches. Two searches with one `name` give the same bits on one machine."""

    @property
    def name(self) -> str: ...

    @property
    def chunk(self) -> int:
        """Values that are best given at a time."""

    def scales(self, w: Floats, shares: Sequence[float], top: float) -> Floats:
        """w f32[n,block] -> scales f32[n] of symmetric codes from -top to top - 1. `shares` are the ranges to try."""

    def codes(self, w: Floats, inverse: Floats, top: float) -> Bytes:
        """w f32[n,block], 1 / scale f32[n] -> codes u8[n,block] from 0 to 2 top - 1: the same bits from every search."""


@dataclass(frozen=True)
class NumpySearch:
    """The search in numpy, on every machine. A cache's worth at a time: each operation reads what the one before wrote."""

    name: str = f"numpy {np.__version__}"
    chunk: int = field(default=1 << 16, repr=False)

    def scales(self, w: Floats, shares: Sequence[float], top: float) -> Floats:
        return _best_scale(w, w, shares, np.float32(top))

    def codes(self, w: Floats, inverse: Floats, top: float) -> Bytes:
        q = w * inverse[:, None]
        np.rint(q, out=q)
        np.clip(q, -top, top - 1, out=q)
        q += np.float32(top)
        return q.astype(np.uint8)


@dataclass(frozen=True)
class _WeightedSearch(NumpySearch):
    """The same for the error that is weighted by `importance` f32[n,block]."""

    importance: Floats = field(kw_only=True)

    def scales(self, w: Floats, shares: Sequence[float], top: float) -> Floats:
        return _best_scale(w, w * self.importance, shares, np.float32(top), self.importance)


NUMPY_SEARCH = NumpySearch()


def quantize(
    format: QuantFormat, values: Floats, method: str, search: ScaleSearch = NUMPY_SEARCH, importance: Floats | None = None
) -> tuple[Bytes, Array, Bytes | None]:
    """values f32[N,K] -> codes u8[N,K], scales [N,blocks] in the format's dtype, zeros u8[N,blocks] where the format has them.
    `importance` f32[K], of the error of each column: the method "search" then finds the least weighted error, in numpy.

    Raises CheckpointError for a block whose scale is too large for fp16."""
    N, K = values.shape
    blocks = format.blocks(K)
    width = blocks * format.block
    codes = np.empty((N, width), np.uint8)
    scales = np.empty((N, blocks), format.scale_dtype)
    zeros = np.empty((N, blocks), np.uint8) if format.zeros else None
    step = max(1, search.chunk // width)
    weights = None if importance is None else np.pad(importance, (0, width - K)).reshape(blocks, format.block)
    for start in range(0, N, step):
        rows = values[start : start + step]
        if width != K:
            rows = np.pad(rows, ((0, 0), (0, width - K)))
        w = np.ascontiguousarray(rows, np.float32).reshape(-1, format.block)
        by_column = None if weights is None else np.tile(weights, (len(rows), 1))
        searcher = search if by_column is None else _WeightedSearch(importance=by_column)
        q, scale, zero = _with_zeros(format, w, method, by_column) if format.zeros else _symmetric(format, w, method, searcher)
        codes[start : start + step] = q.reshape(-1, width)
        scales[start : start + step] = scale.reshape(-1, blocks)
        if zeros is not None and zero is not None:
            zeros[start : start + step] = zero.reshape(-1, blocks)
    if not np.isfinite(scales).all():
        raise CheckpointError(
            "weights are too large to be quantized with fp16 scales",
            got=f"up to {np.abs(values).max():.3g}",
            fix='Set format = "stored" for the matrix in {plan_file}.',
        )
    return codes[:, :K], scales, zeros


def _symmetric(format: QuantFormat, w: Floats, method: str, search: ScaleSearch) -> tuple[Bytes, Array, None]:
    """One zero for all blocks. A scale may be negative: the codes reach one further below zero than above, and the largest value gets that
    end."""
    top = np.float32(format.offset)
    if method == "rtn":
        high, low = _along_rows(np.maximum, w), _along_rows(np.minimum, w)
        scale = (np.maximum(high, -low) / (top - 1)).astype(np.float32, copy=False)
    else:
        scale = search.scales(w, (float(top / (top - 1)), *_SHARES), float(top))
    rounded, inverse = _stored(scale, format)
    return search.codes(w, inverse, float(top)), rounded, None


def _best_scale(w: Floats, weighted: Floats, shares: Sequence[float], top: np.float32, importance: Floats | None = None) -> Floats:
    """`weighted` is w * importance, w without one."""
    high, low = _along_rows(np.maximum, w), _along_rows(np.minimum, w)
    widest = (-np.where(high > -low, high, low) / top).astype(np.float32, copy=False)
    best, gain = np.zeros_like(widest), np.full_like(widest, -1)
    q = np.empty_like(w)
    inverse = _inverse(widest)
    for share in shares:
        np.multiply(w, (inverse / np.float32(share))[:, None], out=q)
        np.rint(q, out=q)
        np.clip(q, -top, top - 1, out=q)
        dot, square = np.einsum("ij,ij->i", weighted, q), _square(q, importance)
        better = dot * dot / square > gain
        gain = np.where(better, dot * dot / square, gain)
        best = np.where(better, dot / square, best)
    return best


def _square(q: Floats, importance: Floats | None) -> Floats:
    """<q,q>, weighted, above zero."""
    found = np.einsum("ij,ij->i", q, q) if importance is None else np.einsum("ij,ij->i", q * importance, q)
    return np.maximum(found, np.float32(1e-30))


def _along_rows(extreme: np.ufunc, w: Floats) -> Floats:
    """Largest or smallest of each row, by halves: numpy is slow to start on rows as short as these. Widths are powers of two."""
    while w.shape[1] > 1:
        half = w.shape[1] // 2
        w = extreme(w[:, :half], w[:, half:])
    return w[:, 0]


def _with_zeros(format: QuantFormat, w: Floats, method: str, importance: Floats | None) -> tuple[Bytes, Array, Bytes]:
    """A zero per block, so that codes cover exactly the values there are. Zero itself stays a value, as it is in every such format."""
    top = np.float32(2 * format.offset - 1)
    high, low = np.maximum(_along_rows(np.maximum, w), 0), np.minimum(_along_rows(np.minimum, w), 0)
    shares = (1.0,) if method == "rtn" else _SHARES
    weighted = w if importance is None else w * importance
    best: tuple[Floats, Floats] | None = None
    gain = np.full(len(w), -1, np.float32)
    for share in shares:
        scale = (high - low) * np.float32(share) / top
        inverse = _inverse(scale)
        zero = np.clip(np.rint(-low * np.float32(share) * inverse), 0, top)
        q = np.clip(np.rint(w * inverse[:, None]) + zero[:, None], 0, top) - zero[:, None]
        dot, square = np.einsum("ij,ij->i", weighted, q), _square(q, importance)
        fitted = scale if method == "rtn" else np.where(dot > 0, dot / square, scale)
        better = dot * dot / square > gain
        gain = np.where(better, dot * dot / square, gain)
        best = (fitted, zero) if best is None else (np.where(better, fitted, best[0]), np.where(better, zero, best[1]))
    scale, zero = cast("tuple[Floats, Floats]", best)
    rounded, inverse = _stored(scale, format)
    q = np.clip(np.rint(w * inverse[:, None]) + zero[:, None], 0, top)
    return q.astype(np.uint8), rounded, zero.astype(np.uint8)


def _stored(scale: Floats, format: QuantFormat) -> tuple[Array, Floats]:
    """The scale as the format stores it, and the inverse of that: codes are made for the scale that will multiply them."""
    with np.errstate(over="ignore"):
        rounded = scale.astype(format.scale_dtype)
    return rounded, _inverse(rounded.astype(np.float32))


def _inverse(scale: npt.NDArray[np.float32]) -> Floats:
    """1 / scale, 0 for a block of zeros."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(np.abs(scale) > 1e-37, 1 / scale, 0).astype(np.float32)
