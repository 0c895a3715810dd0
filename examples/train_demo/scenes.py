"""Drawn pictures and short videos, and what is in them.

    shapes    one shape, several equal ones, or two different ones, in plain colors
    text      a word in capitals or a number, in the font that Pillow carries
    chart     two bars
    video     a shape that moves

A scene is a function of its random generator: the same seed draws the same pixels with the same version of Pillow. Besides its facts, which
questions are made from, it lists marks: where each shape or character is. The tower is first trained on these (train_sight.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 220),
    "yellow": (240, 215, 40),
    "orange": (245, 140, 30),
    "purple": (140, 55, 180),
    "pink": (245, 130, 185),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
GROUNDS: tuple[Color, ...] = ((255, 255, 255), (228, 228, 228), (200, 220, 240), (240, 232, 208), (25, 25, 28), (40, 52, 70), (70, 70, 70))
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring")
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
KINDS = (*SHAPES, "bar", *CHARACTERS)
PLACES = (("top left", "top", "top right"), ("left", "middle", "right"), ("bottom left", "bottom", "bottom right"))
DIRECTIONS: dict[str, Point] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SCALE = 3
"""Pictures are drawn this many times larger and scaled down, so that edges are smooth."""


@dataclass(frozen=True)
class Mark:
    """A shape, bar or character: where its center is in pixels of the picture (of a bar: the middle of its top)."""

    kind: str
    color: str
    x: float
    y: float
    direction: str = ""


@dataclass
class Scene:
    """`frames` u8[F,H,W,3]; `facts` are what the questions of this `topic` need; `marks` of each slice of two frames."""

    topic: str
    frames: npt.NDArray[np.uint8]
    facts: dict[str, Any]
    marks: list[list[Mark]] = field(default_factory=list)


class Canvas:
    """A picture of height x width pixels under the brush. Coordinates are pixels of the finished picture."""

    def __init__(self, height: int, width: int, ground: Color) -> None:
        self.size = (width, height)
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), ground)
        self.draw = ImageDraw.Draw(self.image)

    def finished(self, smooth: bool) -> npt.NDArray[np.uint8]:
        how = Image.Resampling.BICUBIC if smooth else Image.Resampling.BOX
        return np.asarray(self.image.resize(self.size, how))

    def shape(self, kind: str, color: Color, center: Point, radius: float, turn: float = 0.0) -> None:
        x, y, r = center[0] * SCALE, center[1] * SCALE, radius * SCALE
        if kind in ("circle", "ring"):
            box = (x - r, y - r, x + r, y + r)
            if kind == "circle":
                self.draw.ellipse(box, fill=color)
            else:
                self.draw.ellipse(box, outline=color, width=max(2, round(0.34 * r)))
            return
        points = [(x + r * px, y + r * py) for px, py in _rotated(OUTLINES[kind], turn)]
        self.draw.polygon(points, fill=color)

    def text(self, text: str, color: Color, center: Point, size: int) -> list[Point]:
        """Draw it, and return the center of each character."""
        font = sized_font(size * SCALE)
        left, top, right, bottom = font.getbbox(text)
        x, y = center[0] * SCALE - (left + right) / 2, center[1] * SCALE - (top + bottom) / 2
        self.draw.text((x, y), text, fill=color, font=font)
        edges = [x + font.getlength(text[:i]) for i in range(len(text) + 1)]
        return [((a + b) / 2 / SCALE, center[1]) for a, b in pairwise(edges)]


@lru_cache(maxsize=64)
def sized_font(pixels: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(pixels)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise SystemExit("this Pillow has no FreeType, so it cannot draw text at any size: install a wheel from PyPI")
    return font


def _star() -> list[Point]:
    return [((1, 0.45)[i % 2] * math.sin(i * math.pi / 5), -(1, 0.45)[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)]


def _cross(arm: float = 0.36) -> list[Point]:
    a = arm
    return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]


OUTLINES: dict[str, list[Point]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (0.95, 0.75), (-0.95, 0.75)],
    "star": _star(),
    "cross": _cross(),
    "diamond": [(0, -1.05), (0.75, 0), (0, 1.05), (-0.75, 0)],
}


def _rotated(points: Sequence[Point], turn: float) -> list[Point]:
    c, s = math.cos(turn), math.sin(turn)
    return [(c * x - s * y, s * x + c * y) for x, y in points]


def _shade(name: str, rng: random.Random) -> Color:
    r, g, b = (min(255, max(0, value + rng.randint(-12, 12))) for value in COLORS[name])
    return r, g, b


def _ground(colors: Sequence[str], rng: random.Random) -> Color:
    """A background on which all of these colors are easy to see."""
    fit = [g for g in GROUNDS if all(math.dist(g, COLORS[name]) > 110 for name in colors)]
    return rng.choice(fit)


def one_shape(height: int, width: int, rng: random.Random) -> Scene:
    kind, color = rng.choice(SHAPES), rng.choice(list(COLORS))
    row, column = rng.randrange(3), rng.randrange(3)
    radius = rng.uniform(8, 0.17 * min(height, width) + 3)
    x, y = (side * (i + 0.5) / 3 + rng.uniform(-0.06, 0.06) * side for i, side in ((column, width), (row, height)))
    x, y = min(max(x, radius), width - radius), min(max(y, radius), height - radius)
    canvas = Canvas(height, width, _ground([color], rng))
    canvas.shape(kind, _shade(color, rng), (x, y), radius, rng.uniform(-0.15, 0.15))
    facts = {"kind": kind, "color": color, "place": PLACES[row][column]}
    return Scene("one", canvas.finished(rng.random() < 0.5)[None], facts, [[Mark(kind, color, x, y)]])


def several_shapes(height: int, width: int, rng: random.Random) -> Scene:
    """One to six equal shapes."""
    count, kind, color = rng.randint(1, 6), rng.choice(SHAPES), rng.choice(list(COLORS))
    rows, columns = round(height / 24), round(width / 24)
    cells = rng.sample([(r, c) for r in range(rows) for c in range(columns)], count)
    canvas, marks = Canvas(height, width, _ground([color], rng)), []
    for row, column in cells:
        radius = rng.uniform(6.5, 9)
        x = width * (column + 0.5) / columns + rng.uniform(-1.5, 1.5)
        y = height * (row + 0.5) / rows + rng.uniform(-1.5, 1.5)
        canvas.shape(kind, _shade(color, rng), (x, y), radius, rng.uniform(-0.15, 0.15))
        marks.append(Mark(kind, color, x, y))
    return Scene("many", canvas.finished(rng.random() < 0.5)[None], {"kind": kind, "color": color, "count": count}, [marks])


def two_shapes(height: int, width: int, rng: random.Random) -> Scene:
    """Two different shapes of different colors, side by side or one above the other."""
    kinds, colors = rng.sample(SHAPES, 2), rng.sample(list(COLORS), 2)
    beside = width > height or (width == height and rng.random() < 0.5)
    while not any(all(math.dist(g, COLORS[name]) > 110 for name in colors) for g in GROUNDS):
        colors = rng.sample(list(COLORS), 2)
    canvas, marks = Canvas(height, width, _ground(colors, rng)), []
    for i, (kind, color) in enumerate(zip(kinds, colors, strict=True)):
        along, across = 0.25 + 0.5 * i + rng.uniform(-0.03, 0.03), 0.5 + rng.uniform(-0.12, 0.12)
        x, y = (along * width, across * height) if beside else (across * width, along * height)
        canvas.shape(kind, _shade(color, rng), (x, y), rng.uniform(9, 13), rng.uniform(-0.15, 0.15))
        marks.append(Mark(kind, color, x, y))
    places = ("left", "right") if beside else ("top", "bottom")
    return Scene("two", canvas.finished(rng.random() < 0.5)[None], {"kinds": kinds, "colors": colors, "places": places}, [marks])


def written(height: int, width: int, rng: random.Random, text: str) -> Scene:
    """A word or a number, as large as fits or smaller."""
    color = rng.choice(list(COLORS))
    room = [size for size in range(14, 29) if sized_font(size * SCALE).getlength(text) <= (width - 6) * SCALE]
    size = rng.choice(room or [13])
    long, high = sized_font(size * SCALE).getlength(text) / SCALE, 0.75 * size
    free_x, free_y = max(0.0, (width - 4 - long) / 2), max(0.0, (height - 4 - high) / 2)
    center = width / 2 + rng.uniform(-free_x, free_x), height / 2 + rng.uniform(-free_y, free_y)
    canvas = Canvas(height, width, _ground([color], rng))
    places = canvas.text(text, _shade(color, rng), center, size)
    marks = [Mark(character, color, x, y) for character, (x, y) in zip(text, places, strict=True)]
    return Scene("text", canvas.finished(rng.random() < 0.5)[None], {"text": text, "color": color}, [marks])


def two_bars(height: int, width: int, rng: random.Random) -> Scene:
    """A chart: two bars on a line. Their heights differ by a sixth of the picture or more."""
    colors = rng.sample([name for name in COLORS if name != "white"], 2)
    light = [g for g in GROUNDS[:4] if all(math.dist(g, COLORS[name]) > 100 for name in colors)]
    canvas, base = Canvas(height, width, rng.choice(light)), height - rng.uniform(5, 10)
    most = base - 6
    low = rng.uniform(0.12, 0.7) * most
    tall = rng.uniform(low + height / 6, most)
    heights = [low, tall] if rng.random() < 0.5 else [tall, low]
    thick, marks = rng.uniform(0.16, 0.26) * width, []
    for i, (color, high) in enumerate(zip(colors, heights, strict=True)):
        x = width * (0.3 + 0.4 * i) + rng.uniform(-2, 2)
        box = [(x - thick / 2) * SCALE, (base - high) * SCALE, (x + thick / 2) * SCALE, base * SCALE]
        canvas.draw.rectangle(box, fill=_shade(color, rng))
        marks.append(Mark("bar", color, x, base - high))
    canvas.draw.line([0.08 * width * SCALE, base * SCALE, 0.92 * width * SCALE, base * SCALE], fill=(30, 30, 30), width=SCALE)
    return Scene("chart", canvas.finished(rng.random() < 0.5)[None], {"colors": colors, "taller": int(heights[1] > heights[0])}, [marks])


def moving_shape(height: int, width: int, frames: int, rng: random.Random) -> Scene:
    kind, color, direction = rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(list(DIRECTIONS))
    dx, dy = DIRECTIONS[direction]
    radius, ground, shade = rng.uniform(7, 11), _ground([color], rng), _shade(color, rng)
    far = (width if dx else height) - 2 * radius
    step = rng.uniform(0.55, 1.0) * far / (frames - 1)
    room = far - step * (frames - 1)
    start = radius + rng.uniform(0, room)
    across = rng.uniform(radius, (height if dx else width) - radius)
    drawn, places = [], list[Point]()
    smooth = rng.random() < 0.5
    for i in range(frames):
        along = start + i * step
        if dx + dy < 0:
            along = (width if dx else height) - along
        places.append((along, across) if dx else (across, along))
        canvas = Canvas(height, width, ground)
        canvas.shape(kind, shade, places[-1], radius)
        drawn.append(canvas.finished(smooth))
    marks = []
    for i in range(0, frames, 2):
        (ax, ay), (bx, by) = places[i], places[min(i + 1, frames - 1)]
        marks.append([Mark(kind, color, (ax + bx) / 2, (ay + by) / 2, direction)])
    return Scene("video", np.stack(drawn), {"kind": kind, "color": color, "direction": direction}, marks)


STILLS: dict[str, Callable[[int, int, random.Random], Scene]] = {
    "one": one_shape,
    "many": several_shapes,
    "two": two_shapes,
    "chart": two_bars,
}
