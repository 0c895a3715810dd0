"""Where the patches of a slice are: rows of the tower's table of positions with their weights, and angles. They depend on the size only.

The table is a grid x grid picture of learned positions, sampled bilinearly so that its corners fall on those of the slice. Angles turn the
first half of the frequencies by the row of a patch and the second half by its column. (Qwen3.5 reference: Qwen3_5VisionModel.)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from qwen_export.bundle_contract import VISION_INPUTS
from qwen_export.manifest import VisionSpec

_THETA = 10000.0


def patch_positions(rows: int, columns: int, spec: VisionSpec) -> Mapping[str, npt.NDArray[np.generic]]:
    """The inputs of the tower beside the patches, by name, for slices of `rows` x `columns` patches in the order of `patch_rows`."""
    return _made(rows, columns, spec.merge_size, spec.grid, spec.head_dim)


@lru_cache(maxsize=16)
def _made(rows: int, columns: int, merge: int, grid: int, head_dim: int) -> Mapping[str, npt.NDArray[np.generic]]:
    y, x = np.divmod(np.arange(rows * columns, dtype=np.int64).reshape(rows, columns), columns)
    y, x = (_in_blocks(axis, merge) for axis in (y, x))
    low_y, high_y, part_y = (axis[y] for axis in _samples(rows, grid))
    low_x, high_x, part_x = (axis[x] for axis in _samples(columns, grid))
    one = np.float32(1)
    index = np.stack([low_y * grid + low_x, low_y * grid + high_x, high_y * grid + low_x, high_y * grid + high_x], axis=-1)
    weight = np.stack([(one - part_y) * (one - part_x), (one - part_y) * part_x, part_y * (one - part_x), part_y * part_x], axis=-1).astype(
        np.float32
    )
    half = head_dim // 2
    exponent = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = (1.0 / np.power(_THETA, exponent.astype(np.float64)).astype(np.float32)).astype(np.float32)
    angles = np.concatenate([axis[..., None].astype(np.float32) * frequencies for axis in (y, x)], axis=-1)
    found = (index, weight, np.cos(angles), np.sin(angles))
    return dict(zip(VISION_INPUTS[1:], found, strict=True))


def _in_blocks(grid: npt.NDArray[np.int64], merge: int) -> npt.NDArray[np.int64]:
    """[h,w] -> [K,M]: block after block of merge x merge."""
    h, w = grid.shape
    return grid.reshape(h // merge, merge, w // merge, merge).transpose(0, 2, 1, 3).reshape(-1, merge * merge)


def _samples(count: int, grid: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Of each of `count` rows: the two rows of the table around it, and how far it is from the first, in fp32."""
    source = np.arange(count, dtype=np.float32) * np.float32(grid - 1) / np.float32(max(count - 1, 1))
    low = np.floor(source).astype(np.int64)
    return low, np.minimum(low + 1, grid - 1), (source - low.astype(np.float32)).astype(np.float32)
