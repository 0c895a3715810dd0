"""Pictures and videos of messages: a client sends the data itself. It names no files of this machine and no hosts for it to ask, but for
those that the operator allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen_export.runtimes.server.wire_errors import HttpError
from qwen_export.runtimes.vision.picture_source import MediaAccess

_SOURCES = ("image", "image_url", "video", "video_url", "input_audio", "file", "file_data", "url", "path", "base64", "source")
_TEXT = ("text", "input_text", "output_text", "refusal")
_SHOWN = 60


def check_media(messages: Sequence[Mapping[str, Any]], access: MediaAccess) -> None:
    """Raises HttpError 400 for a part whose source is of a kind that nobody may name here: it is neither looked up nor asked for."""
    for i, j, part in _parts(messages):
        for source in _sources(part):
            if not _may_be_named(source, access):
                raise HttpError(
                    "a picture is not sent as data",
                    code="invalid_value",
                    field=f"messages.{i}.content.{j}",
                    got=source[:_SHOWN],
                    expected="data:image/png;base64,...",
                    fix="Send the picture itself as a data URL.",
                )


def has_media(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message holds something else than text."""
    return any(True for _ in _parts(messages))


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    for i, message in enumerate(messages):
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, Mapping) and not (part.get("type", "text") in _TEXT and not any(key in part for key in _SOURCES)):
                yield i, j, part


def _may_be_named(source: str, access: MediaAccess) -> bool:
    if source.startswith("data:"):
        return True
    if source[:8].lower().startswith(("http://", "https://")):
        return bool(access.hosts)
    return bool(source) and access.files


def _sources(part: Mapping[str, Any]) -> Iterator[str]:
    """Every text in a part that may name where its data is."""
    for name in _SOURCES:
        value = part.get(name)
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _sources(value)


def data_part(block: Mapping[str, Any]) -> dict[str, Any]:
    """An image block of Anthropic's protocol as a part of a chat message."""
    source = block.get("source")
    fields = source if isinstance(source, Mapping) else {}
    if fields.get("type") == "base64":
        return {"type": "image_url", "image_url": {"url": f"data:{fields.get('media_type')};base64,{fields.get('data')}"}}
    return {"type": "image_url", "image_url": {"url": str(fields.get("url", ""))}}
