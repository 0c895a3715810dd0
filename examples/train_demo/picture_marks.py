"""Draw scenes by seed, prepare their pixels with the runtime's own code, and label each token of a picture with what is in it.

A token covers 32 x 32 pixels. Its labels are up to SLOTS marks whose centers are inside, from left to right: what it is, its color, where
it moves, and where its center is, in the token and in the picture. They are what the tower learns first; the decoder never sees them.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scenes import COLORS, DIRECTIONS, KINDS, STILLS, Mark, Scene, moving_shape, written

from qwen_export.graphs.vision_config import parse_vision, vision_spec
from qwen_export.manifest import VisionSpec
from qwen_export.runtimes.text.media_parts import IMAGE, VIDEO, MediaPart
from qwen_export.runtimes.vision.chat_media import MediaOptions, open_media
from qwen_export.runtimes.vision.prompt_expansion import Medium

CONFIGS = Path(__file__).parent / "configs"
SLOTS = 4
STILL_SIZES = ((64, 64), (64, 96), (96, 64), (64, 128), (96, 96))
"""Height and width. These pass the processor's bounds as they are."""
VIDEO_SIZE = (64, 64)
HELD_OUT = 1 << 40
"""Seeds from here on are for evaluation."""


@dataclass(frozen=True)
class Subjects:
    """What is drawn: `topics` of stills with their weights, `sizes` of stills, and which share of batches are videos and calls of a tool. A
    batch holds one of these, of one size."""

    topics: Mapping[str, int]
    sizes: Sequence[tuple[int, int]] = STILL_SIZES
    videos: float = 0.12
    tools: float = 0.03


EVERYTHING = Subjects({"one": 3, "many": 3, "two": 4, "text": 14, "chart": 2})
ONE_SHAPE = Subjects({"one": 1}, ((64, 64),), videos=0.0, tools=0.0)
"""To try a change on a CPU before it costs a GPU."""


@cache
def family_config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CONFIGS / "demo-vision.json").read_text())
    return found


@cache
def seeing() -> VisionSpec:
    """How pictures are prepared, read from the files that are exported."""
    raw = family_config()
    vision = parse_vision(raw["vision_config"], raw["text_config"]["hidden_size"], "demo-vision")
    return vision_spec(vision, raw, CONFIGS)


@dataclass(frozen=True)
class Words:
    """Words of four letters to read: `known` are drawn in training, `new` only in evaluation. `parts` of longer words are drawn in
    training, too: the pieces that a tokenizer makes of words are many more than those of the known ones."""

    known: tuple[str, ...]
    new: tuple[str, ...]
    parts: tuple[str, ...]


def words_of(vocabulary: Sequence[str]) -> Words:
    """The words that the tokenizer has as a token behind a blank (written "Ġ"); every fifth is kept for evaluation."""
    letters = sorted(token[1:].upper() for token in vocabulary if token[0] == "Ġ" and token[1:].islower() and token[1:].isascii())
    found = [word for word in letters if word.isalpha() and len(word) == 4]
    new = set(found[::5])
    parts = {word[i : i + 4] for word in letters if word.isalpha() for i in range(len(word) - 3)}
    return Words(tuple(word for word in found if word not in new), tuple(found[::5]), tuple(sorted(parts - new)))


def text_to_write(rng: random.Random, words: Words, held_out: bool, most: int) -> str:
    """Mostly four characters: a number, a word, or letters that are no word (only in training, so that letters are read, not words)."""
    if rng.random() < (0.4 if held_out else 0.2):
        length = 4 if held_out or rng.random() < 0.6 else rng.randint(1, most)
        return "".join(rng.choice(string.digits) for _ in range(length))
    if held_out:
        return rng.choice(words.new)
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(words.known)
    if kind < 0.7:
        return rng.choice(words.parts)
    length = 4 if rng.random() < 0.6 else rng.randint(2, most)
    if rng.random() < 0.5:
        return "".join(rng.choice("AEIOU" if (i + length) % 2 else "BCDFGHKLMNPRSTVW") for i in range(length))
    return "".join(rng.choice(string.ascii_uppercase) for _ in range(length))


def draw_still(seed: int, size: tuple[int, int], words: Words, topics: Mapping[str, int]) -> Scene:
    """A scene of this size in pixels; seeds from HELD_OUT on write words that training never shows."""
    rng = random.Random(seed)
    chosen = rng.choices(list(topics), list(topics.values()))[0]
    if chosen == "text":
        return written(*size, rng, text_to_write(rng, words, seed >= HELD_OUT, min(6, size[1] // 15)))
    return STILLS[chosen](*size, rng)


def draw_video(seed: int, frames: int = 4) -> Scene:
    return moving_shape(*VIDEO_SIZE, frames, random.Random(seed))


def prepared(scene: Scene) -> Medium:
    """What the runtime makes of it: pixels at their final size, and the times of a video's slices."""
    video = len(scene.frames) > 1
    part = MediaPart(VIDEO if video else IMAGE, list(scene.frames) if video else scene.frames[0], "scene")
    return open_media([part], seeing(), MediaOptions())[0]


def levels_of(medium: Medium) -> npt.NDArray[np.uint8]:
    """The rows that the tower reads, as the levels 0 to 255 that they are made from: u8[t,n,columns], a quarter of the size."""
    return np.rint(medium.picture.rows(seeing()) * 127.5 + 127.5).astype(np.uint8)


@dataclass
class Labels:
    """Of each of K tokens of t slices: kinds, colors, motions i64[t,K,SLOTS], 0 for an empty slot; offsets f32[t,K,SLOTS,4]
    from the middle of the token, in tokens, and from the middle of the picture, in pictures."""

    kinds: npt.NDArray[np.int64]
    colors: npt.NDArray[np.int64]
    motions: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.float32]


def labels_of(marks: Sequence[Sequence[Mark]], height: int, width: int) -> Labels:
    factor = seeing().factor
    rows, columns = height // factor, width // factor
    shape = (len(marks), rows * columns, SLOTS)
    made = Labels(*(np.zeros(shape, np.int64) for _ in range(3)), np.zeros((*shape, 4), np.float32))
    colors, directions = list(COLORS), list(DIRECTIONS)
    for t, found in enumerate(marks):
        taken = [0] * (rows * columns)
        for mark in sorted(found, key=lambda m: (m.x, m.y)):
            row, column = min(int(mark.y // factor), rows - 1), min(int(mark.x // factor), columns - 1)
            at = row * columns + column
            slot = taken[at]
            if slot == SLOTS:
                continue
            taken[at] += 1
            made.kinds[t, at, slot] = 1 + KINDS.index(mark.kind)
            made.colors[t, at, slot] = 1 + colors.index(mark.color)
            made.motions[t, at, slot] = 1 + directions.index(mark.direction) if mark.direction else 0
            in_token = mark.x / factor - column - 0.5, mark.y / factor - row - 0.5
            made.offsets[t, at, slot] = *in_token, mark.x / width - 0.5, mark.y / height - 0.5
    return made
