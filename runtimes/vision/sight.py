"""How a loaded bundle sees: its tower, and the pictures of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qwen_export.manifest import VisionSpec
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.text.chat_prompt import ChatPrompt
from qwen_export.runtimes.text.media_parts import media_part, take_media
from qwen_export.runtimes.vision.chat_media import MediaOptions, open_media
from qwen_export.runtimes.vision.prompt_expansion import ExpandedPrompt, expand_prompt
from qwen_export.runtimes.vision.vision_encoder import VisionEncoder


class Sight:
    """`encode` makes token ids of a plain text: the times of video frames are written as text."""

    def __init__(self, session: Session, spec: VisionSpec, encode: Callable[[str], list[int]]) -> None:
        self.spec, self.encoder = spec, VisionEncoder(session, spec)
        self._encode = encode

    def check(self, part: Mapping[str, Any], options: MediaOptions | None = None) -> None:
        """Read a picture or video as `see` would. Raises ParameterError for what cannot be read."""
        open_media(take_media([{"content": [media_part(part, "")]}]), self.spec, options or MediaOptions())

    def see(self, prompt: ChatPrompt, options: MediaOptions | None = None) -> ExpandedPrompt:
        """The prompt with a token for each part of its pictures. They are decoded and scaled now; the tower reads each when the prompt is
        read, unless it was read before. Raises ParameterError for what cannot be read."""
        media = open_media(prompt.media, self.spec, options or MediaOptions())
        return expand_prompt(prompt.ids, prompt.mark_at, media, self.spec, self.encoder.features, self._encode)
