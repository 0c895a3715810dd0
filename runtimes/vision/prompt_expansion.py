"""The ids of a rendered prompt, where each picture is one placeholder, to those that the model reads: a placeholder per token of the
picture, and positions.

A text token moves the position by one. A picture of a x b tokens has positions (p, p + row, p + column), and moves p by the larger side,
not by its tokens. (Qwen3.5 reference: Qwen3_5Model.get_rope_index.) A slice of a video is a picture; in front of it is its time as text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from qwen_export.errors import ParameterError
from qwen_export.manifest import VisionSpec
from qwen_export.runtimes.decoding.prompt_pictures import Features, PromptPictures, SeenMedia
from qwen_export.runtimes.decoding.sequence import Media
from qwen_export.runtimes.vision.picture import Grid, Picture


@dataclass(frozen=True)
class ExpandedPrompt:
    """`ids` of all tokens; `mark_at` as in `Request`."""

    ids: list[int]
    mark_at: int | None
    pictures: PromptPictures


@dataclass(frozen=True)
class Medium:
    """A picture of a prompt, or a video with the `seconds` of each of its slices. `where` it is in the messages."""

    picture: Picture
    where: str
    seconds: tuple[float, ...] = ()

    @property
    def video(self) -> bool:
        return bool(self.seconds)


def expand_prompt(
    ids: Sequence[int],
    mark_at: int | None,
    media: Sequence[Medium],
    spec: VisionSpec,
    features: Callable[..., Features],
    encode: Callable[[str], list[int]],
) -> ExpandedPrompt:
    """`media` in the order of their placeholders. `features` is the tower, which takes a Picture and a
    signal to stop, or none; `encode` makes ids of a text. Raises ParameterError where the
    placeholders are not those of the media."""
    tokens = (spec.image_token, spec.video_token)
    found = [i for i, token in enumerate(ids) if token in tokens]
    if [ids[i] for i in found] != [tokens[medium.video] for medium in media]:
        raise ParameterError(
            "the chat template did not write one placeholder for each picture and video",
            parameter="messages",
            got=f"{len(found)} placeholders",
            expected=f"{len(media)}",
            fix="Put pictures into messages of the user or of tools, or use the chat template of the release.",
        )
    writer, start, new_mark = _Writer(spec), 0, None
    for at, medium in zip(found, media, strict=True):
        if mark_at is not None and start <= mark_at <= at:
            new_mark = len(writer.ids) + mark_at - start
        writer.text(ids[start:at])
        writer.medium(medium, features, encode)
        start = at + 1
    if mark_at is not None and mark_at >= start:
        new_mark = len(writer.ids) + mark_at - start
    writer.text(ids[start:])
    positions = np.concatenate(writer.positions) if writer.positions else np.zeros((0, 3), np.int32)
    return ExpandedPrompt(writer.ids, new_mark, PromptPictures(tuple(writer.seen), positions.astype(np.int32)))


class _Writer:
    """The prompt so far: `p` is the position of the next text token."""

    def __init__(self, spec: VisionSpec) -> None:
        self._spec = spec
        self.ids: list[int] = []
        self.positions: list[np.ndarray] = []
        self.seen: list[SeenMedia] = []
        self.p = 0

    def text(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self.positions.append(np.repeat(np.arange(self.p, self.p + len(ids))[:, None], 3, axis=1))
        self.p += len(ids)

    def medium(self, medium: Medium, features: Callable[..., Features], encode: Callable[[str], list[int]]) -> None:
        start, grid, places = len(self.ids), medium.picture.grid, []
        if medium.video:
            for seconds in medium.seconds:
                self.text([*encode(f"<{seconds:.1f} seconds>"), self._spec.start_token])
                places.append(self._slice(grid, self._spec.video_token))
                self.text([self._spec.end_token])
        else:
            places.append(self._slice(grid, self._spec.image_token))
        where = Media(start, len(self.ids) - start, medium.picture.digest)
        self.seen.append(SeenMedia(where, np.concatenate(places), partial(features, medium.picture)))

    def _slice(self, grid: Grid, token: int) -> np.ndarray:
        a, b = grid.rows // self._spec.merge_size, grid.columns // self._spec.merge_size
        start = len(self.ids)
        self.ids += [token] * (a * b)
        rows, columns = np.divmod(np.arange(a * b), b)
        self.positions.append(self.p + np.stack([np.zeros_like(rows), rows, columns], axis=1))
        self.p += max(a, b)
        return np.arange(start, len(self.ids))
