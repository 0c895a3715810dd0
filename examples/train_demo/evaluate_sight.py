"""Ask a built bundle about held-out pictures, through the project's runtime.

    qwen-export build ../demo-vision -o build/vision          # fp32; another one with --precision int4
    python evaluate_sight.py build/vision build/vision-int4 --count 200

An answer counts when it is equal to the expected one, to the letter. Pictures come from seeds that training does not use; the words to be
read are never drawn in training. Prints one row per kind of question and one column per bundle, and fails when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from picture_chats import REPORT_TOOL, asked_of, open_writer, with_picture
from picture_marks import EVERYTHING, HELD_OUT, ONE_SHAPE, Subjects, Words, draw_still, draw_video
from picture_questions import GOALS
from scenes import Scene
from train_tower import TOKENIZER

from qwen_export.runtimes import SamplingParams, load

ASKED = (
    ("color", "one"),
    ("color", "two"),
    ("shape", "one"),
    ("shape", "two"),
    ("count", "many"),
    ("place", "one"),
    ("place", "two"),
    ("text", "text"),
    ("bar", "chart"),
    ("direction", "video"),
)
"""Kinds of questions, and the scenes in which they are asked."""


def scenes(topic: str, count: int, words: Words, subjects: Subjects = EVERYTHING) -> Iterator[Scene]:
    for i in range(count):
        seed = HELD_OUT + 1_000_003 * (1 + i)
        if topic == "video":
            yield draw_video(seed, 4 + 2 * (i % 2))
        else:
            yield draw_still(seed, subjects.sizes[i % len(subjects.sizes)], words, {topic: 1})


def asked(subjects: Subjects) -> list[tuple[str, str]]:
    return [(asks, topic) for asks, topic in ASKED if (subjects.videos if topic == "video" else topic in subjects.topics)]


def messages_of(scene: Scene, question: str) -> list[dict[str, Any]]:
    media = with_picture(question, scene)
    part = media[0]
    part[part["type"]] = list(scene.frames) if part["type"] == "video" else scene.frames[0]
    return [{"role": "user", "content": media}]


def share_right(model: Any, asks: str, topic: str, count: int, words: Words, subjects: Subjects, shown: int) -> float:
    """Percent of exact answers. `shown`: print so many wrong ones."""
    rng, right = random.Random(0), 0
    for scene in scenes(topic, count, words, subjects):
        wanted = asked_of(scene, asks, rng)
        answer = answer_of(model, messages_of(scene, wanted.question))
        right += answer == wanted.answer
        if answer != wanted.answer and shown:
            shown -= 1
            print(f"  {topic}: {wanted.question} expected {wanted.answer!r}, got {answer!r}")
    return 100 * right / count


def answer_of(model: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    options = {"enable_thinking": False, "sampling": SamplingParams(greedy=True), "max_new_tokens": 48} | options
    return "".join(model.stream(messages, **options)).strip()


def other_forms(model: Any, count: int, words: Words) -> dict[str, float]:
    """Percent right of answers behind a thought, and of calls of a tool that name the shape and its color."""
    rng, thought, called = random.Random(1), 0, 0
    for scene in scenes("one", count, words):
        wanted = asked_of(scene, "color", rng)
        answer = answer_of(model, messages_of(scene, wanted.question), enable_thinking=True)
        thought += answer.rpartition("</think>")[2].strip() == wanted.answer
        call = answer_of(model, messages_of(scene, "Report the shape."), tools=[REPORT_TOOL])
        called += all(f">\n{scene.facts[name]}\n" in call for name in ("kind", "color")) and "<function=report_shape>" in call
    return {"color, thinking": 100 * thought / count, "call of a tool": 100 * called / count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=200, help="pictures of each kind")
    parser.add_argument("--show", type=int, default=0, help="wrong answers of each kind to print")
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument("--one-shape", action="store_true", help="of a model that was trained so")
    args = parser.parse_args()
    subjects = ONE_SHAPE if args.one_shape else EVERYTHING
    words, table = open_writer(TOKENIZER).words, dict[str, list[float]]()
    for bundle in args.bundles:
        with load(str(bundle)) as model:
            for asks, topic in asked(subjects):
                right = share_right(model, asks, topic, args.count, words, subjects, args.show)
                table.setdefault(f"{asks}, {topic}", []).append(right)
            for name, value in other_forms(model, args.count, words).items() if subjects.tools else ():
                table.setdefault(name, []).append(value)
    print("| asked, scene | goal | " + " | ".join(bundle.name for bundle in args.bundles) + " |")
    print("|---|" + "---|" * (1 + len(args.bundles)))
    missed = []
    for name, values in table.items():
        goal = GOALS.get(name.split(",")[0]) if "thinking" not in name else None
        print(f"| {name} | {goal or ''} | " + " | ".join(f"{value:.1f}" for value in values) + " |", flush=True)
        if goal and (values[0] < goal or min(values) < values[0] - 2):
            missed.append(name)
    if args.json:
        args.json.write_text(
            json.dumps({"count": args.count, "bundles": [b.name for b in args.bundles], "percent": table}, indent=1) + "\n"
        )
    if missed:
        raise SystemExit(f"goals missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
