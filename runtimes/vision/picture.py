"""A picture as the model will see it: pixels at their final size, and a digest of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from qwen_export.errors import ParameterError
from qwen_export.manifest import VisionSpec
from qwen_export.runtimes.vision.decode_picture import MOST_DECODED, decode_picture, planes_of, planes_of_array
from qwen_export.runtimes.vision.patch_rows import Rows, patch_rows
from qwen_export.runtimes.vision.picture_size import Bounds, picture_size
from qwen_export.runtimes.vision.picture_source import MediaAccess, named_source, read_source
from qwen_export.runtimes.vision.resample import Pixels, resized


@dataclass(frozen=True)
class Grid:
    """Patches of a medium: `slices` in time, and rows and columns of each slice."""

    slices: int
    rows: int
    columns: int

    def tokens(self, merge: int) -> int:
        """Tokens of one slice."""
        return self.rows * self.columns // merge**2


@dataclass(frozen=True)
class Picture:
    """`pixels` u8[F,3,H,W], F frames of a video or one. `digest` names what is seen: pixels and size."""

    pixels: Pixels
    grid: Grid
    digest: bytes

    def rows(self, spec: VisionSpec, first: int = 0, count: int | None = None) -> Rows:
        """What the tower reads of `count` slices from `first` on, f32[slices,n,columns]."""
        F = spec.temporal_patch_size
        return patch_rows(self.pixels[first * F : None if count is None else (first + count) * F], spec)


def open_picture(
    source: Any,
    spec: VisionSpec,
    where: str = "",
    *,
    access: MediaAccess | None = None,
    bounds: Bounds | None = None,
    most_decoded: int = MOST_DECODED,
) -> Picture:
    """`source`: a path, a data URL, an address, encoded bytes, a picture of Pillow, or an array u8[H,W,3]. `bounds` replace those of the
    model; `most_decoded`: pixels before it is scaled. Raises ParameterError for what cannot be read, in one message."""
    where = named_source(source, where)
    planes = _planes(source, access or MediaAccess(), where, most_decoded)
    _, high, wide = planes.shape
    height, width = picture_size(high, wide, spec.factor, bounds or Bounds(spec.min_pixels, spec.max_pixels), where)
    return made_picture(resized(planes, height, width)[None], spec)


def made_picture(frames: Pixels, spec: VisionSpec) -> Picture:
    """From frames u8[F,3,H,W] of their final size."""
    count, _, height, width = frames.shape
    grid = Grid(-(-count // spec.temporal_patch_size), height // spec.patch_size, width // spec.patch_size)
    digest = sha256(b"%d,%d,%d;" % (count, height, width))
    digest.update(np.ascontiguousarray(frames).data)
    return Picture(frames, grid, digest.digest())


def _planes(source: Any, access: MediaAccess, where: str, most: int) -> Pixels:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode_picture(bytes(source), where, most)
    if isinstance(source, (str, os.PathLike)):
        return decode_picture(read_source(source, access, where), where, most)
    if isinstance(source, np.ndarray):
        return planes_of_array(source, where)
    if type(source).__module__.split(".")[0] == "PIL":
        return planes_of(source, where, most)
    raise ParameterError(
        "a picture cannot be read",
        parameter="messages",
        where=where,
        got=type(source).__name__,
        expected="a path, a data URL, bytes, a picture of Pillow or an array of pixels",
        fix="Give one of these.",
    )
