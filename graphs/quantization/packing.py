"""The layout of quantised matrices, as plugins/native/cpu/quant.h describes it: panels of 16 rows that the kernels read where they lie.

Anything that has codes, scales and zeros on a block grid, also what a checkpoint brings along, packs into it without loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

PANEL_ROWS = 16
BITS, BLOCKS = (4, 8), (32, 64, 128)
_ALIGNMENT = 64


@dataclass(frozen=True)
class QuantFormat:
    """w[n,k] = scale * (code - zero) with unsigned codes of `bits`; a scale per row and `block` values along K. Without `zeros` the zero is
    2^(bits-1) everywhere. Scales are fp16, or fp32 where `wide_scales`."""

    bits: int
    block: int
    zeros: bool = False
    wide_scales: bool = False

    def blocks(self, K: int) -> int:
        return -(-K // self.block)

    def panel_bytes(self, K: int) -> int:
        """Bytes of 16 rows."""
        sizes = self._sizes(K)
        return sum(sizes)

    def packed_shape(self, N: int, K: int) -> tuple[int, int]:
        return -(-N // PANEL_ROWS), self.panel_bytes(K)

    def bits_per_weight(self, K: int) -> float:
        return self.panel_bytes(K) * 8 / (PANEL_ROWS * K)

    @property
    def offset(self) -> int:
        """The zero of all blocks where a format has no zeros."""
        return 1 << (self.bits - 1)

    @property
    def scale_dtype(self) -> npt.DTypeLike:
        return np.float32 if self.wide_scales else np.float16

    def attributes(self, N: int, K: int) -> dict[str, int]:
        """The attributes of a quantised op on a matrix [N,K]."""
        return {"bits": self.bits, "block": self.block, "zeros": int(self.zeros), "wide_scales": int(self.wide_scales), "N": N, "K": K}

    def _sizes(self, K: int) -> tuple[int, int, int]:
        """Bytes of a panel's scales, zeros and codes."""
        blocks = self.blocks(K)
        scales = _aligned(blocks * PANEL_ROWS * np.dtype(self.scale_dtype).itemsize)
        return scales, _aligned(blocks * PANEL_ROWS) if self.zeros else 0, blocks * self.block * PANEL_ROWS * self.bits // 8


def pack(format: QuantFormat, codes: Bytes, scales: Array, zeros: Bytes | None = None) -> Bytes:
    """codes u8[N,K], scales [N,blocks] (rounded to the format's dtype), zeros u8[N,blocks] -> u8[panels, bytes of a panel].

    Rows and values that fill up the last panel and block have scale 0 and code 0."""
    N, K = codes.shape
    blocks, panels = format.blocks(K), -(-N // PANEL_ROWS)
    scale_bytes, zero_bytes, _ = format._sizes(K)
    packed = np.zeros(format.packed_shape(N, K), np.uint8)

    def by_panel(values: Array, dtype: npt.DTypeLike) -> Bytes:
        """[N,blocks] as the bytes of [panels, blocks, 16]."""
        whole = _filled(values, panels * PANEL_ROWS, blocks).astype(dtype, copy=False)
        return np.ascontiguousarray(whole.reshape(panels, PANEL_ROWS, blocks).transpose(0, 2, 1)).reshape(panels, -1).view(np.uint8)

    made = by_panel(scales, format.scale_dtype)
    packed[:, : made.shape[1]] = made
    if format.zeros:
        if zeros is None:
            raise ValueError("the format has zeros and none are given")
        made = by_panel(zeros, np.uint8)
        packed[:, scale_bytes : scale_bytes + made.shape[1]] = made
    whole = _filled(codes, panels * PANEL_ROWS, blocks * format.block)
    if format.bits == 4:
        pairs = whole.reshape(-1, 2, 4)
        whole = (pairs[:, 0] | pairs[:, 1] << 4).reshape(panels * PANEL_ROWS, -1)
    # Four bytes of a row stay together: transpose words.
    words = whole.view(np.uint32).reshape(panels, PANEL_ROWS, -1).transpose(0, 2, 1)
    packed[:, scale_bytes + zero_bytes :] = np.ascontiguousarray(words).reshape(panels, -1).view(np.uint8)
    return packed


def unpack(format: QuantFormat, packed: Bytes, N: int, K: int) -> tuple[Bytes, Array, Bytes | None]:
    """The inverse of `pack`: codes u8[N,K], scales [N,blocks] in the format's dtype, zeros u8[N,blocks] where the format has them."""
    panels, blocks = len(packed), format.blocks(K)
    scale_bytes, zero_bytes, _ = format._sizes(K)

    def by_row(part: Bytes, dtype: npt.DTypeLike) -> Array:
        used = np.ascontiguousarray(part[:, : blocks * PANEL_ROWS * np.dtype(dtype).itemsize]).view(dtype)
        return np.ascontiguousarray(used.reshape(panels, blocks, PANEL_ROWS).transpose(0, 2, 1)).reshape(-1, blocks)[:N]

    scales = by_row(packed[:, :scale_bytes], format.scale_dtype)
    zeros = by_row(packed[:, scale_bytes : scale_bytes + zero_bytes], np.uint8) if format.zeros else None
    words = np.ascontiguousarray(packed[:, scale_bytes + zero_bytes :]).view(np.uint32).reshape(panels, -1, PANEL_ROWS)
    codes = np.ascontiguousarray(words.transpose(0, 2, 1)).reshape(panels * PANEL_ROWS, -1).view(np.uint8)
    if format.bits == 4:
        fours = codes.reshape(-1, 4)
        codes = np.stack([fours & 15, fours >> 4], axis=1).reshape(panels * PANEL_ROWS, -1)
    return codes[:N, :K], scales, None if zeros is None else zeros.astype(np.uint8)


def dequantize(format: QuantFormat, codes: Bytes, scales: Array, zeros: Bytes | None = None) -> Floats:
    """scale * (code - zero) in fp32, from `unpack`'s values."""
    K = codes.shape[1]

    def spread(values: Array) -> Floats:
        return np.repeat(values.astype(np.float32), format.block, axis=1)[:, :K]

    centred = codes.astype(np.float32) - (np.float32(format.offset) if zeros is None else spread(zeros))
    return spread(scales) * centred


def _filled(values: Array, rows: int, columns: int) -> Array:
    """`values` with zeros below and to the right."""
    if values.shape == (rows, columns):
        return np.ascontiguousarray(values)
    whole = np.zeros((rows, columns), values.dtype)
    whole[: values.shape[0], : values.shape[1]] = values
    return whole


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
