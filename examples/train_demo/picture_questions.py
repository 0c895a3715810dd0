"""Questions about a drawn scene, with the answer and a thought that leads to it.

One fact has several wordings of its question and one wording of its answer, so that an answer is right when it is equal.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scenes import Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
GOALS = {"color": 95, "shape": 95, "count": 95, "place": 95, "text": 90, "bar": 95, "direction": 90}
"""Percent of held-out questions that must be answered exactly, by what they ask for."""


@dataclass(frozen=True)
class Question:
    """`asks` is a key of GOALS, or "all" for a description. `thought`: what the picture shows, said before the answer."""

    asks: str
    question: str
    answer: str
    thought: str


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """All that this scene can be asked, each in one of its wordings, in random order."""
    description, asked = _TOPICS[scene.topic](scene.facts)
    found = [Question(asks, rng.choice(wordings), answer, description) for asks, wordings, answer in asked]
    found.append(Question("all", rng.choice(_DESCRIBE), description, "I am asked what I see."))
    rng.shuffle(found)
    return found


_Asked = list[tuple[str, tuple[str, ...], str]]
_DESCRIBE = ("Describe the picture.", "What do you see?", "What is in the picture?", "Describe this.")
_ONE_COLOR = ("What color is it?", "Which color is it?", "What is its color?")
_ONE_SHAPE = ("What shape is it?", "What shape is this?", "Which shape do you see?")


def at(place: str) -> str:
    """ "left" -> "on the left"."""
    if place == "middle":
        return "in the middle"
    return f"{'on' if place in ('left', 'right') else 'at'} the {place}"


def _one(facts: dict[str, Any]) -> tuple[str, _Asked]:
    kind, color, place = facts["kind"], facts["color"], facts["place"]
    asked: _Asked = [
        ("color", (f"What color is the {kind}?", "What color is the shape?", *_ONE_COLOR), f"It is {color}."),
        ("shape", (f"What shape is {color}?", "Which shape is this?", *_ONE_SHAPE), f"It is a {kind}."),
        ("place", (f"Where is the {kind}?", "Where is the shape?", "Where is it?"), f"It is {at(place)}."),
    ]
    return f"A {color} {kind} {at(place)}.", asked


def _many(facts: dict[str, Any]) -> tuple[str, _Asked]:
    kind, color, count = facts["kind"], facts["color"], facts["count"]
    plural = f"{kind}es" if kind == "cross" else f"{kind}s"
    number = NUMBERS[count]
    there = f"There is one {kind}." if count == 1 else f"There are {number} {plural}."
    asked: _Asked = [
        (
            "count",
            (f"How many {plural} are there?", "How many shapes are there?", f"How many {plural} do you see?", f"Count the {plural}."),
            there,
        )
    ]
    if count > 1:
        asked.append(
            ("color", (f"What color are the {plural}?", "What color are the shapes?", "What color are they?"), f"They are {color}.")
        )
        asked.append(("shape", ("What shapes are these?", "Which shapes do you see?", "What shapes are there?"), f"They are {plural}."))
    return f"{number.capitalize()} {color} {kind if count == 1 else plural}.", asked


def _two(facts: dict[str, Any]) -> tuple[str, _Asked]:
    (a, b), (red, blue), (here, there) = facts["kinds"], facts["colors"], facts["places"]
    asked: _Asked = []
    for kind, color, place, other in ((a, red, here, b), (b, blue, there, a)):
        asked += [
            (
                "color",
                (f"What color is the {kind}?", f"Which color is the {kind}?", f"What color is the shape {at(place)}?"),
                f"It is {color}.",
            ),
            ("shape", (f"Which shape is {color}?", f"What shape is {at(place)}?", f"What is {color}?"), f"It is a {kind}."),
            (
                "place",
                (f"Where is the {kind}?", f"Where is the {color} shape?", f"Is the {kind} {here} or {there}?"),
                f"It is {at(place)}.",
            ),
        ]
        if here == "left":
            asked.append(("place", (f"On which side of the {other} is the {kind}?",), f"It is {at(place)}."))
    return f"A {red} {a} {at(here)} and a {blue} {b} {at(there)}.", asked


def _text(facts: dict[str, Any]) -> tuple[str, _Asked]:
    text, color = facts["text"], facts["color"]
    if text.isdigit():
        named, wordings = "number", ("Which number is this?", "Read the number.", "What number do you see?")
    else:
        named, wordings = "word", ("Which word is this?", "Read the word.", "What word do you see?")
    asked: _Asked = [
        ("text", (*wordings, "What does it say?", "Read the text.", "What is written here?"), text),
        ("color", (f"What color is the {named}?", "What color is the text?", *_ONE_COLOR), f"It is {color}."),
    ]
    return f"A {named} in {color}: {text}", asked


def _chart(facts: dict[str, Any]) -> tuple[str, _Asked]:
    (left, right), taller = facts["colors"], facts["taller"]
    sides = ("left", "right")
    asked: _Asked = []
    for word, index in (("taller", taller), ("shorter", 1 - taller)):
        color = (left, right)[index]
        asked.append(("bar", (f"Which bar is {word}?", f"Is the left or the right bar {word}?"), f"The {sides[index]} bar is {word}."))
        asked.append(("bar", (f"What color is the {word} bar?", f"Which color has the {word} bar?"), f"It is {color}."))
    for side, color in zip(sides, (left, right), strict=True):
        asked.append(("color", (f"What color is the {side} bar?",), f"It is {color}."))
    return f"A chart with a {left} bar and a {right} bar. The {sides[taller]} bar is taller.", asked


def _video(facts: dict[str, Any]) -> tuple[str, _Asked]:
    kind, color, direction = facts["kind"], facts["color"], facts["direction"]
    moves = f"to the {direction}" if direction in ("left", "right") else direction
    asked: _Asked = [
        ("direction", (f"Which way does the {kind} move?", "Which way does it move?", "Where does the shape move?"), f"It moves {moves}."),
        ("color", (f"What color is the {kind}?", *_ONE_COLOR), f"It is {color}."),
        ("shape", ("What shape moves?", "Which shape is moving?"), f"It is a {kind}."),
    ]
    return f"A {color} {kind} moves {moves}.", asked


_TOPICS: dict[str, Callable[[dict[str, Any]], tuple[str, _Asked]]] = {
    "one": _one,
    "many": _many,
    "two": _two,
    "text": _text,
    "chart": _chart,
    "video": _video,
}
