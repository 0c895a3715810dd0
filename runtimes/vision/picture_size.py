"""The size at which the model sees a picture (transformers: `smart_resize` of Qwen2VLImageProcessor and Qwen3VLVideoProcessor).

Sides become multiples of patch * merge, each rounded by itself, and the area is brought between two bounds. There is no padding: the
picture is stretched by up to half a multiple per side.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from qwen_export.errors import ParameterError

_MOST_STRETCHED = 200
"""How many times one side may be as long as the other: exactly this passes."""


class Bounds(NamedTuple):
    """Least and most pixels of a picture. For a video they count all its frames."""

    least: int
    most: int


def picture_size(height: int, width: int, factor: int, bounds: Bounds, where: str = "") -> tuple[int, int]:
    """Height and width, both multiples of `factor`. Raises ParameterError for a picture that is too narrow."""
    _check_sides(height, width, where)
    # Half goes to the even multiple, as Python rounds: 48 -> 64, 80 -> 64, 112 -> 128 with a factor of 32.
    rounded = round(height / factor) * factor, round(width / factor) * factor
    return _bounded(height, width, factor, bounds, 1, rounded, rounded[0] * rounded[1])


def frame_size(frames: int, height: int, width: int, factor: int, temporal: int, bounds: Bounds, where: str = "") -> tuple[int, int]:
    """The same for each of so many frames of a video, of which `temporal` make one patch."""
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_sides(height, width, where)
    rounded = round(height / factor) * factor, round(width / factor) * factor
    area = round(frames / temporal) * temporal * rounded[0] * rounded[1]
    return _bounded(height, width, factor, bounds, frames, rounded, area)


def _bounded(height: int, width: int, factor: int, bounds: Bounds, frames: int, rounded: tuple[int, int], area: int) -> tuple[int, int]:
    """`rounded` sides whose pixels in all frames are `area`, or others where that is out of bounds."""
    if area > bounds.most:
        beta = math.sqrt((frames * height * width) / bounds.most)
        return max(factor, math.floor(height / beta / factor) * factor), max(factor, math.floor(width / beta / factor) * factor)
    if area < bounds.least:
        beta = math.sqrt(bounds.least / (frames * height * width))
        return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return rounded


def _check_sides(height: int, width: int, where: str) -> None:
    if min(height, width) < 1:
        raise ParameterError(
            "a picture has no pixels", parameter="messages", where=where, got=f"{width}x{height}", fix="Give a picture with pixels."
        )
    if max(height, width) / min(height, width) > _MOST_STRETCHED:
        raise ParameterError(
            "a picture is too narrow",
            parameter="messages",
            where=where,
            got=f"{width}x{height} pixels",
            expected=f"a long side at most {_MOST_STRETCHED} times the short one",
            fix="Cut the picture, or put it on a wider background.",
        )
