"""The pictures and videos of a chat: from the parts of its messages to what the model sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen_export.errors import ParameterError
from qwen_export.manifest import VisionSpec
from qwen_export.runtimes.text.media_parts import IMAGE, MediaPart
from qwen_export.runtimes.vision.picture import open_picture
from qwen_export.runtimes.vision.picture_size import Bounds
from qwen_export.runtimes.vision.picture_source import MediaAccess, decoded_base64
from qwen_export.runtimes.vision.prompt_expansion import Medium


@dataclass(frozen=True)
class MediaOptions:
    """What the pictures of a request may be. `access`: where they may come from. `min_pixels` and `max_pixels` replace those of the model:
    fewer pixels are fewer tokens and less time, 32 x 32 of them per token. A part of a message can narrow them, not widen."""

    access: MediaAccess = field(default_factory=MediaAccess)
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value > 0):
                raise ParameterError("the number of pixels is not positive", parameter=name, got=repr(value), fix=f"Change {{{name}}}.")


def open_media(parts: Sequence[MediaPart], spec: VisionSpec, options: MediaOptions) -> list[Medium]:
    """Decode and scale everything. Raises ParameterError with the part that cannot be read."""
    return [_opened(part, spec, options) for part in parts]


def _opened(part: MediaPart, spec: VisionSpec, options: MediaOptions) -> Medium:
    if part.kind != IMAGE:
        raise ParameterError(
            "a message holds a video, which the bundle cannot read",
            parameter="messages",
            where=part.where,
            got="a part of type video",
            expected="text or pictures",
            fix="Send some of its frames as pictures.",
        )
    source = decoded_base64(part.source, part.where) if part.encoded and isinstance(part.source, str) else part.source
    bounds = picture_bounds(part, spec, options)
    return Medium(open_picture(source, spec, part.where, access=options.access, bounds=bounds), part.where)


def picture_bounds(part: MediaPart, spec: VisionSpec, options: MediaOptions) -> Bounds:
    """Least and most pixels of one picture."""
    most = min(value for value in (spec.max_pixels, options.max_pixels, part.max_pixels) if value is not None)
    least = part.min_pixels or options.min_pixels or spec.min_pixels
    most = max(most, spec.factor**2)
    return Bounds(min(least, most), most)
