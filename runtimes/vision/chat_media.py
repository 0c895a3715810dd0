"""The pictures and videos of a chat: from the parts of its messages to what the model sees."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen_export.errors import ParameterError
from qwen_export.manifest import VisionSpec
from qwen_export.runtimes.text.media_parts import VIDEO, MediaPart
from qwen_export.runtimes.vision.decode_picture import MOST_DECODED
from qwen_export.runtimes.vision.decode_video import FrameRules, decode_video, frames_as_given
from qwen_export.runtimes.vision.picture import made_picture, open_picture
from qwen_export.runtimes.vision.picture_size import Bounds
from qwen_export.runtimes.vision.picture_source import MediaAccess, decoded_base64, named_source, read_source
from qwen_export.runtimes.vision.prompt_expansion import Medium


@dataclass(frozen=True)
class MediaOptions:
    """What the pictures and videos of a request may be. `access`: where they may come from. `min_pixels` and `max_pixels` replace those of
    the model for pictures: fewer pixels are fewer tokens and less time, 32 x 32 of them per token. `max_video_pixels` does so for all
    frames of a video together, and `max_frames` for their number. A part of a message can narrow these, not widen. `max_decoded`:
    pixels of one file before it is scaled, of a video those of all its frames; None leaves the limit for one picture or frame alone.
    `max_media_tokens`: of all pictures and videos of a request together."""

    access: MediaAccess = field(default_factory=MediaAccess)
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_video_pixels: int | None = None
    max_frames: int | None = None
    max_decoded: int | None = None
    max_media_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "max_video_pixels", "max_frames", "max_decoded", "max_media_tokens"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value > 0):
                raise ParameterError("a limit for media is no positive number", parameter=name, got=repr(value), fix=f"Change {{{name}}}.")


def open_media(parts: Sequence[MediaPart], spec: VisionSpec, options: MediaOptions) -> list[Medium]:
    """Decode and scale everything. Raises ParameterError with the part that cannot be read, or with which there are too many tokens."""
    opened, tokens = [], 0
    for part in parts:
        medium = _opened(part, spec, options)
        opened.append(medium)
        tokens += medium.picture.grid.slices * medium.picture.grid.tokens(spec.merge_size)
        if options.max_media_tokens is not None and tokens > options.max_media_tokens:
            raise ParameterError(
                "the pictures and videos have too many tokens",
                parameter="messages",
                where=part.where,
                got=f"{tokens} up to this one",
                expected=f"at most {options.max_media_tokens}",
                fix="Send fewer or smaller ones: a picture has a token for 32 x 32 pixels.",
            )
    return opened


def _opened(part: MediaPart, spec: VisionSpec, options: MediaOptions) -> Medium:
    if part.kind == VIDEO:
        return _video(part, spec, options)
    source = decoded_base64(part.source, part.where) if part.encoded and isinstance(part.source, str) else part.source
    bounds = picture_bounds(part, spec, options)
    most = min(MOST_DECODED, options.max_decoded or MOST_DECODED)
    picture = open_picture(source, spec, part.where, access=options.access, bounds=bounds, most_decoded=most)
    return Medium(picture, part.where)


def _video(part: MediaPart, spec: VisionSpec, options: MediaOptions) -> Medium:
    most = min(value for value in (spec.max_frames, options.max_frames) if value is not None)
    pixels = min(value for value in (spec.video_max_pixels, options.max_video_pixels) if value is not None)
    if part.max_pixels is not None:  # of each frame, as Qwen's own tools have it
        pixels = min(pixels, part.max_pixels * most)
    bounds = Bounds(min(spec.video_min_pixels, pixels), pixels)
    rules = FrameRules(part.fps or spec.fps, min(spec.min_frames, most), most, bounds, options.max_decoded or 0)
    source, where = part.source, part.where if part.encoded else named_source(part.source, part.where)
    if isinstance(source, np.ndarray) or (isinstance(source, (list, tuple)) and source):
        frames = frames_as_given(list(source), spec, rules, where)
    elif isinstance(source, (str, os.PathLike)):
        data = decoded_base64(str(source), where) if part.encoded else read_source(source, options.access, where)
        frames = decode_video(data, spec, rules, where)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        frames = decode_video(bytes(source), spec, rules, where)
    else:
        raise ParameterError(
            "a video cannot be read",
            parameter="messages",
            where=where,
            got=type(source).__name__,
            expected="a path, a data URL, bytes, or frames as arrays of pixels",
            fix="Give one of these.",
        )
    return Medium(made_picture(frames.pixels, spec), where, frames.seconds)


def picture_bounds(part: MediaPart, spec: VisionSpec, options: MediaOptions) -> Bounds:
    """Least and most pixels of one picture."""
    most = min(value for value in (spec.max_pixels, options.max_pixels, part.max_pixels) if value is not None)
    least = part.min_pixels or options.min_pixels or spec.min_pixels
    most = max(most, spec.factor**2)
    return Bounds(min(least, most), most)
