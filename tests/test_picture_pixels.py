"""Pixels of a picture as transformers prepares them: sizes, resampling, rows of patches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from qwen_export.errors import ParameterError
from qwen_export.runtimes.vision.patch_rows import patch_rows
from qwen_export.runtimes.vision.picture import open_picture
from qwen_export.runtimes.vision.picture_size import Bounds, picture_size
from qwen_export.runtimes.vision.resample import Pixels, resized
from tests.support.pictures import SPEC, noise

RELEASED = Bounds(65536, 16777216)


def test_sizes_are_those_of_transformers() -> None:
    random = np.random.default_rng(1)
    for height, width in (2 ** random.uniform(0, 14, (4000, 2))).astype(int).tolist():
        if max(height, width) > 200 * min(height, width):
            continue
        expected = smart_resize(height, width, 32, min_pixels=RELEASED.least, max_pixels=RELEASED.most)
        assert picture_size(height, width, 32, RELEASED) == expected


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1, 1, (256, 256)), (80, 80, (256, 256)), (272, 304, (256, 320)), (1, 200, (32, 3648)), (8000, 6000, (4704, 3520))],
)
def test_sizes_at_the_edges(height: int, width: int, expected: tuple[int, int]) -> None:
    assert picture_size(height, width, 32, RELEASED) == expected


def test_a_picture_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"too narrow.*got 1x201 pixels"):
        picture_size(201, 1, 32, RELEASED)


@pytest.mark.parametrize("seed", range(60))
def test_resampling_is_bit_for_bit_that_of_torch(seed: int) -> None:
    random = np.random.default_rng(seed)
    height, width, high, wide = random.integers(1, 200, 4).tolist()
    planes = noise(height, width, seed) if seed % 2 else _ramp(height, width)
    given = torch.from_numpy(planes)[None]
    expected = torch.nn.functional.interpolate(given, (high, wide), mode="bicubic", antialias=True, align_corners=False)
    np.testing.assert_array_equal(resized(planes, high, wide), expected[0].numpy())


def _ramp(height: int, width: int) -> Pixels:
    return np.linspace(0, 255.4, 3 * height * width).reshape(3, height, width).astype(np.uint8)


def test_rows_are_those_of_transformers() -> None:
    """A size that needs no resampling, which depends on the release of Pillow there. The last bit of half the levels differs between
    their two processors, too."""
    pixels = np.random.default_rng(3).integers(0, 256, (288, 320, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": RELEASED.least, "longest_edge": RELEASED.most},
        image_mean=list(SPEC.mean),
        image_std=list(SPEC.std),
    )
    expected = processor(images=[Image.fromarray(pixels)], return_tensors="np")
    picture = open_picture(pixels, SPEC)
    assert (1, 18, 20) == (picture.grid.slices, picture.grid.rows, picture.grid.columns) == tuple(expected["image_grid_thw"][0])
    rows = picture.rows(SPEC)
    assert rows.shape == (1, 360, 1536)
    np.testing.assert_allclose(rows[0], expected["pixel_values"], rtol=0, atol=6e-8)


def test_rows_of_other_statistics() -> None:
    frames = noise(32, 32, 5)[None]
    plain = patch_rows(frames, SPEC).reshape(1, 4, 3, 512)
    other = patch_rows(frames, replace(SPEC, mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 1.0))).reshape(1, 4, 3, 512)
    np.testing.assert_array_equal(other[:, :, 0], plain[:, :, 0])
    np.testing.assert_allclose(other[:, :, 2], (plain[:, :, 2] + 1) / 2, atol=1e-6)


def test_the_last_frame_of_an_odd_number_is_repeated() -> None:
    frames = np.stack([noise(32, 64, seed) for seed in range(3)])
    rows = patch_rows(frames, SPEC)
    assert rows.shape == (2, 8, 1536)
    np.testing.assert_array_equal(rows, patch_rows(np.concatenate([frames, frames[2:]]), SPEC))
