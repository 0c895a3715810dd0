"""Parts of chat messages that are pictures or videos, in the forms of transformers, of OpenAI's protocols and of Qwen's own tools.

    {"type": "image", "image": SOURCE}          also "url", "path", "base64"
    {"type": "image_url", "image_url": {"url": SOURCE}}         or the source itself; type "input_image" likewise
    {"type": "video", "video": SOURCE}

`min_pixels` and `max_pixels` of a part replace those of the model; OpenAI's `"detail": "low"` stands for 512 x 512 pixels at most. What a
SOURCE may be is decided where it is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_export.errors import ParameterError

IMAGE, VIDEO = "image", "video"
_IMAGE_KEYS, _VIDEO_KEYS = ("image", "image_url"), ("video", "video_url")
_IMAGE_TYPES, _VIDEO_TYPES = ("image", "image_url", "input_image"), ("video", "video_url", "input_video")
_SOURCES = ("url", "path", "base64")
_KEPT = "media_part"
_LOW_DETAIL = 512 * 512


@dataclass(frozen=True)
class MediaPart:
    """`kind` is IMAGE or VIDEO. `where` it is in the messages. `encoded`: the source is base64 of a file."""

    kind: str
    source: Any
    where: str
    encoded: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None


def media_part(part: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The part as templates know it, with the picture kept beside; None for a part that is none."""
    kind = part.get("type")
    for name, types, keys in ((IMAGE, _IMAGE_TYPES, _IMAGE_KEYS), (VIDEO, _VIDEO_TYPES, _VIDEO_KEYS)):
        if kind in types or (kind is None and any(key in part for key in keys)):
            return {"type": name, _KEPT: _kept(name, part, keys, where)}
    return None


def _kept(name: str, part: Mapping[str, Any], keys: Sequence[str], where: str) -> MediaPart:
    given = [key for key in (*keys, *_SOURCES) if part.get(key) is not None]
    source = part[given[0]] if given else None
    encoded = bool(given) and given[0] == "base64"
    low = part.get("detail") == "low"
    if isinstance(source, Mapping):
        low = low or source.get("detail") == "low"
        encoded = source.get("url") is None and source.get("base64") is not None
        source = source.get("url", source.get("base64"))
    if source is None or len(given) > 1:
        raise ParameterError(
            f"a part of type {name} has no source" if not given else f"a part of type {name} has more than one source",
            parameter="messages",
            where=where,
            got=", ".join(given) or ", ".join(map(str, part)),
            expected=f'{{"type": "{name}", "{name}": SOURCE}}',
            fix="Give one path, address, data URL or picture.",
        )
    least, most, fps = (_number(part, key, where) for key in ("min_pixels", "max_pixels", "fps"))
    if low and name == IMAGE:
        most = min(_LOW_DETAIL, most or _LOW_DETAIL)
    return MediaPart(name, source, where, encoded, None if least is None else int(least), None if most is None else int(most), fps)


def _number(part: Mapping[str, Any], key: str, where: str) -> float | None:
    value = part.get(key)
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**40):
        return value
    raise ParameterError(
        f"the {key} of a part is not a positive number", parameter="messages", where=where, got=repr(value)[:100], fix=f"Correct {key}."
    )


def take_media(messages: Sequence[dict[str, Any]]) -> list[MediaPart]:
    """The media of normalized messages, in order; the messages keep parts without them."""
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return [part.pop(_KEPT) for content in contents for part in content if _KEPT in part]
