"""Pixels to the rows that the vision tower reads: one row per patch of patch x patch pixels in two frames."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from qwen_export.manifest import VisionSpec
from qwen_export.runtimes.vision.resample import Pixels

Rows = npt.NDArray[np.float32]


def patch_rows(frames: Pixels, spec: VisionSpec) -> Rows:
    """u8[F,3,H,W] -> f32[t,n,3*F'*P*P] with F' = frames per patch, t = F/F' rounded up (the last frame is repeated) and n = H*W/P^2.

    Rows go through blocks of merge x merge patches, block after block, so that those which become one token are neighbors. Columns are
    ordered channel, frame, y, x."""
    P, M, F = spec.patch_size, spec.merge_size, spec.temporal_patch_size
    missing = -len(frames) % F
    if missing:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    count, channels, height, width = frames.shape
    t, h, w = count // F, height // P, width // P
    parts = frames.reshape(t, F, channels, h // M, M, P, w // M, M, P)
    # Reordered as bytes, then looked up: a quarter of the memory traffic.
    rows = parts.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t, h * w, channels, F * P * P)
    levels = _levels(spec.mean, spec.std)
    if len(set(zip(spec.mean, spec.std, strict=True))) == 1:
        return np.take(levels[0], rows).reshape(t, h * w, channels * F * P * P)
    made = np.empty(rows.shape, np.float32)
    for channel, table in enumerate(levels):
        made[:, :, channel] = np.take(table, rows[:, :, channel])
    return made.reshape(t, h * w, channels * F * P * P)


@lru_cache(maxsize=4)
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> list[Rows]:
    """What the 256 levels of a pixel become, by channel: fp32 of (level - 255 mean) / (255 std), as torchvision's processor computes."""
    levels = np.arange(256, dtype=np.float32)
    scale = np.float32(255.0)
    return [(levels - np.float32(m) * scale) / (np.float32(s) * scale) for m, s in zip(mean, std, strict=True)]
