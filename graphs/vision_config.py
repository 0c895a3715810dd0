"""The vision tower's configuration, and how pictures are prepared for it, read from the checkpoint and validated.

The preparation is in processor files of their own. Their values differ from the defaults of transformers' classes, so what a file does not
have, or a checkpoint without these files, gets the values of the releases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_export.graphs.config_fields import Fields
from qwen_export.graphs.json_file import read_json_object
from qwen_export.manifest import VisionSpec

LAYER_NORM_EPS = 1e-6
THETA = 10000.0
"""Constants of the family's towers, which no file has."""
_MOST_BLOCKS = 1024
_PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class VisionConfig:
    """Sizes in elements. `grid` is the side of the table of positions."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    grid: int

    def keys(self) -> dict[str, int]:
        """The values by the keys of a vision_config."""
        own = {"spatial_merge_size": self.merge_size, "num_position_embeddings": self.grid**2, "in_channels": 3}
        return {**asdict(self), **own}

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merged(self) -> int:
        """Patches of one token."""
        return self.merge_size**2

    @property
    def row_width(self) -> int:
        """Values of a patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2


def parse_vision(raw: Mapping[str, Any], hidden_size: int, where: str) -> VisionConfig:
    """Validate a vision_config. Raises ConfigError for sizes and forms that are not those of the family."""
    f = Fields(raw, f"{where}, vision_config")
    f.must_be("hidden_act", "gelu_pytorch_tanh")
    f.must_be("in_channels", 3)
    f.must_be("deepstack_visual_indexes", [], None)
    cells = f.integer("num_position_embeddings")
    config = VisionConfig(
        depth=f.integer("depth", maximum=_MOST_BLOCKS),
        hidden_size=f.integer("hidden_size"),
        num_heads=f.integer("num_heads"),
        intermediate_size=f.integer("intermediate_size"),
        out_hidden_size=f.integer("out_hidden_size"),
        patch_size=f.integer("patch_size", 16),
        temporal_patch_size=f.integer("temporal_patch_size", 2),
        merge_size=f.integer("spatial_merge_size", 2),
        grid=math.isqrt(cells),
    )
    if config.grid**2 != cells:
        raise f.wrong("num_position_embeddings", cells, "a square number")
    if config.hidden_size % config.num_heads or config.head_dim % 4:
        raise f.wrong("num_heads", config.num_heads, "heads of a multiple of 4 values each")
    if config.out_hidden_size != hidden_size:
        raise f.wrong("out_hidden_size", config.out_hidden_size, f"the decoder's hidden_size, {hidden_size}")
    return config


def vision_spec(config: VisionConfig, raw: Mapping[str, Any], directory: Path) -> VisionSpec:
    """What a runtime must know to see. `raw` is config.json; the processor files are those of `directory`. Raises ConfigError."""
    ids = Fields(raw, str(directory / "config.json"))
    pictures, videos = _processors(directory)
    found = f"{directory}, {_PROCESSORS[0]}"
    f, v = Fields(pictures, found), Fields(videos, f"{directory}, {_PROCESSORS[1]}")
    for processor in (f, v):
        processor.must_be("patch_size", config.patch_size, None)
        processor.must_be("temporal_patch_size", config.temporal_patch_size, None)
        processor.must_be("merge_size", config.merge_size, None)
        processor.must_be("resample", 3, None)
        for switch in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            processor.must_be(switch, True, None)
    least, most = _area(f, (65536, 16777216))
    video_least, video_most = _area(v, (4096, 25165824))
    return VisionSpec(
        image_token=ids.integer("image_token_id", minimum=0),
        video_token=ids.integer("video_token_id", minimum=0),
        start_token=ids.integer("vision_start_token_id", minimum=0),
        end_token=ids.integer("vision_end_token_id", minimum=0),
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.merge_size,
        grid=config.grid,
        head_dim=config.head_dim,
        mean=_channels(f, "image_mean"),
        std=_channels(f, "image_std"),
        min_pixels=least,
        max_pixels=most,
        video_min_pixels=video_least,
        video_max_pixels=video_most,
        fps=v.number("fps", 2.0),
        min_frames=v.integer("min_frames", 4),
        max_frames=v.integer("max_frames", 768),
    )


def _processors(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings for pictures and for videos; re-saved checkpoints have both in one nested file."""
    files = [read_json_object(directory / name, "settings") if (directory / name).exists() else {} for name in _PROCESSORS]
    nested = [files[2].get("image_processor"), files[2].get("video_processor")]
    found = [own or (inner if isinstance(inner, dict) else {}) for own, inner in zip(files[:2], nested, strict=True)]
    return found[0], found[1]


def _area(f: Fields, usual: tuple[int, int]) -> tuple[int, int]:
    """Least and most pixels, under the new names or the old ones."""
    size = f.data.get("size")
    if size is not None and not isinstance(size, dict):
        raise f.wrong("size", size, "an object with shortest_edge and longest_edge")
    given = Fields({**(size or {})}, f.where)
    found = []
    for key, old, value in zip(("shortest_edge", "longest_edge"), ("min_pixels", "max_pixels"), usual, strict=True):
        found.append(f.integer(old) if f.data.get(old) is not None else given.integer(key, value))
    if found[0] > found[1]:
        raise f.wrong("size", size, "a shortest_edge that is not above longest_edge")
    return found[0], found[1]


def _channels(f: Fields, key: str) -> tuple[float, ...]:
    values = f.data.get(key, [0.5, 0.5, 0.5])
    if not isinstance(values, list) or len(values) != 3 or not all(type(v) in (int, float) and 0 <= v <= 1 for v in values):
        raise f.wrong(key, values, "three numbers from 0 to 1")
    return tuple(float(v) for v in values)
