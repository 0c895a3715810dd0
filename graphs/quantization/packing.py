"""The layout of quantized matrices, as plugins/native/cpu/quant.h describes it: panels of 16 rows that the kernels read in place.

Anything that has codes, scales and zeros on a block grid, also that of a checkpoint, packs into it without loss.
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
_GROUP = 4  # blocks whose scales are stored together


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
        blocks = self.blocks(K)
        return -(-blocks // _GROUP) * self.header_bytes + blocks * self.block_bytes

    @property
    def header_bytes(self) -> int:
        """Scales and zeros of a group of blocks."""
        return _GROUP * PANEL_ROWS * (np.dtype(self.scale_dtype).itemsize + int(self.zeros))

    @property
    def block_bytes(self) -> int:
        """Codes of 16 rows of a block."""
        return self.block * PANEL_ROWS * self.bits // 8

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
        """The attributes of a quantized op on a matrix [N,K]."""
        return {"bits": self.bits, "block": self.block, "zeros": int(self.zeros), "wide_scales": int(self.wide_scales), "N": N, "K": K}


def part_bytes(format: QuantFormat, N: int, K: int, scale_bytes: int, zero_bits: int) -> int:
    """Codes, scales and zeros of a matrix [N,K] in separate tensors (standard_blocks.py, expert_blocks.py)."""
    blocks = N * format.blocks(K)
    return N * K * format.bits // 8 + blocks * scale_bytes + (blocks * zero_bits // 8 if format.zeros else 0)


def pack(format: QuantFormat, codes: Bytes, scales: Array, zeros: Bytes | None = None) -> Bytes:
    """codes u8[N,K], scales [N,blocks] (rounded to the format's dtype), zeros u8[N,blocks] -> u8[panels, bytes of a panel].

    Rows, blocks and values that fill up the last panel, group and block have scale 0 and code 0."""
    N, K = codes.shape
    blocks, panels = format.blocks(K), -(-N // PANEL_ROWS)
    groups = -(-blocks // _GROUP)
    if (zeros is not None) != format.zeros:
        raise ValueError("zeros are given where the format has none, or the other way round")

    def headers(values: Array, dtype: npt.DTypeLike) -> Bytes:
        """[N,blocks] as the bytes of [panels, groups, 4, 16]."""
        whole = _filled(values, panels * PANEL_ROWS, groups * _GROUP).astype(dtype, copy=False)
        turned = np.ascontiguousarray(whole.reshape(panels, PANEL_ROWS, -1).transpose(0, 2, 1))
        return turned.reshape(panels, groups, -1).view(np.uint8)

    whole = _filled(codes, panels * PANEL_ROWS, blocks * format.block)
    if format.bits == 4:
        pairs = whole.reshape(-1, 2, 4)
        whole = (pairs[:, 0] | np.left_shift(pairs[:, 1], 4)).reshape(panels * PANEL_ROWS, -1)
    # Four bytes of a row stay together: transpose words.
    words = whole.view(np.uint32).reshape(panels, PANEL_ROWS, -1).transpose(0, 2, 1)
    stored = np.zeros((panels, groups * _GROUP * format.block_bytes // 4), np.uint32)
    stored[:, : words.shape[1] * PANEL_ROWS] = words.reshape(panels, -1)
    parts = [headers(scales, format.scale_dtype), *([headers(zeros, np.uint8)] if zeros is not None else [])]
    parts.append(stored.view(np.uint8).reshape(panels, groups, -1))
    return np.ascontiguousarray(np.concatenate(parts, axis=2).reshape(panels, -1)[:, : format.panel_bytes(K)])


def unpack(format: QuantFormat, packed: Bytes, N: int, K: int) -> tuple[Bytes, Array, Bytes | None]:
    """The inverse of `pack`: codes u8[N,K], scales [N,blocks] in the format's dtype, zeros u8[N,blocks] where the format has them."""
    panels, blocks = len(packed), format.blocks(K)
    groups, group_bytes = -(-blocks // _GROUP), format.header_bytes + _GROUP * format.block_bytes
    whole = np.asarray(_filled(packed, panels, groups * group_bytes), np.uint8).reshape(panels, groups, group_bytes)
    scale_bytes = _GROUP * PANEL_ROWS * np.dtype(format.scale_dtype).itemsize

    def by_row(part: Bytes, dtype: npt.DTypeLike) -> Array:
        turned = np.ascontiguousarray(part).view(dtype).reshape(panels, groups * _GROUP, PANEL_ROWS).transpose(0, 2, 1)
        return np.ascontiguousarray(turned.reshape(panels * PANEL_ROWS, -1)[:N, :blocks])

    scales = by_row(whole[:, :, :scale_bytes], format.scale_dtype)
    zeros = by_row(whole[:, :, scale_bytes : format.header_bytes], np.uint8).astype(np.uint8) if format.zeros else None
    words = np.ascontiguousarray(whole[:, :, format.header_bytes :]).view(np.uint32).reshape(panels, -1, PANEL_ROWS)
    codes = np.ascontiguousarray(words.transpose(0, 2, 1)).reshape(panels * PANEL_ROWS, -1).view(np.uint8)
    if format.bits == 4:
        fours = codes.reshape(-1, 4)
        codes = np.stack([fours & 15, fours >> 4], axis=1).reshape(panels * PANEL_ROWS, -1)
    return codes[:N, :K], scales, zeros


def dequantize(format: QuantFormat, codes: Bytes, scales: Array, zeros: Bytes | None = None) -> Floats:
    """scale * (code - zero) in fp32, from `unpack`'s values."""
    K = codes.shape[1]

    def spread(values: Array) -> Floats:
        return np.repeat(values.astype(np.float32), format.block, axis=1)[:, :K]

    centered = codes.astype(np.float32) - (np.float32(format.offset) if zeros is None else spread(zeros))
    return spread(scales) * centered


def _filled(values: Array, rows: int, columns: int) -> Array:
    """`values` with zeros below and to the right."""
    if values.shape == (rows, columns):
        return np.ascontiguousarray(values)
    whole = np.zeros((rows, columns), values.dtype)
    whole[: values.shape[0], : values.shape[1]] = values
    return whole
