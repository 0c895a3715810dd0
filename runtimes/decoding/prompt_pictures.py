"""What the pictures of a prompt add to its token ids: rows that stand for some tokens, and rotary positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.decoding.rotary_tables import Positions
from qwen_export.runtimes.decoding.sequence import Media
from qwen_export.runtimes.decoding.stop_signal import StopSignal

Features = npt.NDArray[np.generic]


class Encode(Protocol):
    """The rows that stand for a picture or video, [tokens, H]. With a signal that is given it raises, and what is left is not done."""

    def __call__(self, stop: StopSignal | None = None, /) -> Features: ...


@dataclass(frozen=True)
class SeenMedia:
    """A picture or video in a prompt. `places`: positions of the tokens that its features stand for, ascending. `features` makes them,
    [len(places), H]: the work is done when a token of the picture is about to be read, and not if it was read before."""

    media: Media
    places: npt.NDArray[np.int64]
    features: Encode


@dataclass(frozen=True)
class PromptPictures:
    """Of a prompt of n tokens: what is seen, in order, and the `positions` [n,3] of all tokens."""

    seen: tuple[SeenMedia, ...]
    positions: Positions

    @property
    def media(self) -> tuple[Media, ...]:
        return tuple(one.media for one in self.seen)

    def features(self, start: int, stop: int, encoded: Mapping[int, Features] | None = None) -> tuple[Features | None, list[int]]:
        """What stands for tokens of pictures among tokens `start` .. `stop - 1`, and for which of them, counted from `start`. `encoded`:
        features that were made before, by the place in `seen`."""
        parts, places = [], list[int]()
        for i, one in enumerate(self.seen):
            first, last = np.searchsorted(one.places, (start, stop)).tolist()
            if first < last:
                made = encoded.get(i) if encoded is not None else None
                parts.append((one.features() if made is None else made)[first:last])
                places += (one.places[first:last] - start).tolist()
        return (np.concatenate(parts) if len(parts) > 1 else parts[0]) if parts else None, places

    def places_at(self, start: int, stop: int) -> Positions | None:
        """The positions of tokens `start` .. `stop - 1`; None where they follow one after the other. Tokens behind the prompt do."""
        if start >= len(self.positions):
            return None
        found = self.positions[start:stop]
        if stop > len(self.positions):
            following = int(self.positions.max()) + 1 + np.arange(stop - len(self.positions), dtype=np.int32)
            found = np.concatenate([found, np.repeat(following[:, None], 3, axis=1)])
        return None if stop <= self._plain else found

    @cached_property
    def _plain(self) -> int:
        """Tokens at the beginning whose positions are those of text."""
        own = (self.positions != np.arange(len(self.positions), dtype=np.int32)[:, None]).any(axis=1)
        return int(own.argmax()) if own.any() else len(own)


def prompt_read(
    slot: int,
    text: Sequence[int],
    start: int,
    stop: int,
    media: Sequence[Media],
    pictures: PromptPictures | None,
    logits: int = 1,
    encoded: Mapping[int, Features] | None = None,
) -> Read:
    """The read of tokens `start` .. `stop - 1` of a text, which begins with a prompt and its pictures."""
    return read_at(slot, text[start:stop], start, media, pictures, logits=logits, encoded=encoded)


def read_at(
    slot: int,
    ids: Sequence[int],
    start: int,
    media: Sequence[Media],
    pictures: PromptPictures | None,
    *,
    logits: int,
    commit: bool = True,
    encoded: Mapping[int, Features] | None = None,
) -> Read:
    """The read of these tokens as those from `start` on, of which some may be behind the prompt."""
    stop = start + len(ids)
    completed = tuple(m for m in media if start < m.start + m.count <= stop)
    if pictures is None:
        return Read(slot, ids, commit, logits, media=completed)
    features, places = pictures.features(start, stop, encoded)
    return Read(slot, ids, commit, logits, features, places, completed, pictures.places_at(start, stop))
