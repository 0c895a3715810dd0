"""How a loaded bundle sees: its tower, and the pictures of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen_export.errors import ParameterError
from qwen_export.manifest import VisionSpec
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.text.chat_prompt import ChatPrompt
from qwen_export.runtimes.text.media_parts import MediaPart, media_part, take_media
from qwen_export.runtimes.vision.chat_media import MediaOptions, open_media
from qwen_export.runtimes.vision.prompt_expansion import ExpandedPrompt, Medium, expand_prompt
from qwen_export.runtimes.vision.tower_calls import tower_calls
from qwen_export.runtimes.vision.vision_encoder import VisionEncoder


class Sight:
    """`towers`: the graphs of the tower. `encode` makes token ids of a plain text: the times of video frames are written as text."""

    def __init__(self, towers: Sequence[Session], spec: VisionSpec, encode: Callable[[str], list[int]]) -> None:
        self.spec, self.encoder = spec, VisionEncoder(tower_calls(towers), spec)
        self._encode = encode

    def check(self, part: Mapping[str, Any], options: MediaOptions | None = None) -> None:
        """Read a picture or video as `see` would. Raises ParameterError for what cannot be read."""
        self._open(take_media([{"content": [media_part(part, "")]}]), options)

    def see(self, prompt: ChatPrompt, options: MediaOptions | None = None) -> ExpandedPrompt:
        """The prompt with a token for each part of its pictures. They are decoded and scaled now; the tower reads each when the prompt is
        read, unless it was read before. Raises ParameterError for what cannot be read."""
        media = self._open(prompt.media, options)
        return expand_prompt(prompt.ids, prompt.mark_at, media, self.spec, self.encoder.features, self._encode)

    def _open(self, parts: Sequence[MediaPart], options: MediaOptions | None) -> list[Medium]:
        """Raises ParameterError for a picture that no graph of the tower is large enough for."""
        media, largest, pixels = open_media(parts, self.spec, options or MediaOptions()), self.encoder.tower.largest, self.spec.factor**2
        for medium in media:
            tokens = medium.picture.grid.tokens(self.spec.merge_size)
            if largest is not None and tokens > largest:
                raise ParameterError(
                    "a picture is larger than the bundle was built for",
                    parameter="messages",
                    where=medium.where,
                    got=f"{tokens} tokens, {tokens * pixels} pixels",
                    expected=f"at most {largest} tokens, {largest * pixels} pixels",
                    fix=f"Scale pictures down with {{max_pixels}} = {largest * pixels}, or build with larger {{picture_tokens}}.",
                )
        return media
