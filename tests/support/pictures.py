"""Pictures for tests, and how the released models see."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from qwen_export.manifest import VisionSpec
from qwen_export.runtimes.vision.picture import Picture, open_picture
from qwen_export.runtimes.vision.picture_size import Bounds
from qwen_export.runtimes.vision.resample import Pixels

SPEC = VisionSpec(
    image_token=248056,
    video_token=248057,
    start_token=248053,
    end_token=248054,
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    grid=48,
    head_dim=64,
)


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    """u8[3,H,W]."""
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.ascontiguousarray(noise(height, width, seed).transpose(1, 2, 0)))


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def seen(height: int, width: int, spec: VisionSpec, seed: int = 0) -> Picture:
    """A picture of noise at a size that the model sees as it is: multiples of 32."""
    pixels = np.ascontiguousarray(noise(height, width, seed).transpose(1, 2, 0))
    return open_picture(pixels, spec, bounds=Bounds(32 * 32, 4096 * 4096))
