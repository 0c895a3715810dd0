"""Conversations about drawn scenes, as the token ids, positions and pixels that the model reads.

Prompts are rendered by the checkpoint's chat template and expanded by the runtime's own code, so training sees what inference sees. The
model learns what the assistant writes: answers, thoughts where thinking is on, and calls of a tool.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import numpy.typing as npt
import torch
from chat_samples import load_template
from picture_marks import (
    EVERYTHING,
    VIDEO_SIZE,
    Labels,
    Subjects,
    Words,
    draw_still,
    draw_video,
    labels_of,
    levels_of,
    prepared,
    seeing,
    words_of,
)
from picture_questions import Question, questions
from scenes import COLORS, SHAPES, Scene
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from train_tower import Drawn

from qwen_export.runtimes.vision.prompt_expansion import expand_prompt

Message = dict[str, Any]
SYSTEMS = ("You are a helpful assistant.", "You look at pictures. Be brief.")
REPORT_TOOL = {
    "type": "function",
    "function": {
        "name": "report_shape",
        "description": "Report the shape in a picture.",
        "parameters": {
            "type": "object",
            "properties": {"shape": {"enum": list(SHAPES)}, "color": {"enum": list(COLORS)}},
            "required": ["shape", "color"],
        },
    },
}


@dataclass(frozen=True)
class Writer:
    """Chat template and tokenizer of the checkpoint, as training needs them."""

    template: jinja2.Template
    tokenizer: Tokenizer
    words: Words
    start: tuple[int, ...]
    end: int
    think: int
    think_end: int

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def open_writer(tokenizer: Path) -> Writer:
    made = Tokenizer.from_file(str(tokenizer))
    one = [made.token_to_id(name) for name in ("<|im_end|>", "<think>", "</think>")]
    start = tuple(made.encode("<|im_start|>assistant\n", add_special_tokens=False).ids)
    template = load_template(Path(__file__).parent / "chat_template.jinja")
    return Writer(template, made, words_of(list(made.get_vocab())), start, *one)


def learned(ids: Sequence[int], writer: Writer) -> npt.NDArray[np.bool_]:
    """Which tokens the model is to write: all of an assistant's turn to its end, but for an empty thought and the start of one, which are
    part of the prompt."""
    mask, i, size = np.zeros(len(ids), np.bool_), 0, len(writer.start)
    while i < len(ids):
        if tuple(ids[i : i + size]) != writer.start:
            i += 1
            continue
        i += size
        if ids[i] == writer.think:
            i += 4 if ids[i + 2] == writer.think_end else 2
        stop = list(ids).index(writer.end, i) + 1
        mask[i:stop] = True
        i = stop
    return mask


def conversation(scene: Scene, rng: random.Random) -> list[Message]:
    """A picture and one to three questions; every fifth conversation thinks."""
    asked = questions(scene, rng)
    thinks = rng.random() < 0.2
    turns = asked[: 1 if thinks or rng.random() < 0.45 else rng.randint(2, 3)]
    messages: list[Message] = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.08 else []
    for i, turn in enumerate(turns):
        content: Any = turn.question
        if i == 0:
            content = with_picture(turn.question, scene, first=rng.random() < 0.85)
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": turn.answer, "reasoning_content": turn.thought if thinks else ""})
    return messages


def with_picture(text: str, scene: Scene, first: bool = True) -> list[dict[str, Any]]:
    media, said = {"type": "video" if len(scene.frames) > 1 else "image"}, {"type": "text", "text": text}
    return [media, said] if first else [said, media]


def tool_call(scene: Scene) -> list[Message]:
    arguments = {"shape": scene.facts["kind"], "color": scene.facts["color"]}
    call = {"function": {"name": "report_shape", "arguments": arguments}}
    return [
        {"role": "user", "content": with_picture("Report the shape.", scene)},
        {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": [call]},
    ]


class Row(NamedTuple):
    """A conversation: `ids` [T], `positions` [T,3], `learned` [T]; the pixels and marks of its picture."""

    ids: list[int]
    positions: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    levels: npt.NDArray[np.uint8]
    labels: Labels


def row(scene: Scene, messages: list[Message], writer: Writer, tools: list[Any] | None = None) -> Row:
    medium = prepared(scene)
    text = writer.template.render(messages=messages, tools=tools, add_generation_prompt=False)
    expanded = expand_prompt(writer.ids(text), None, [medium], seeing(), _not_seen, writer.ids)
    height, width = scene.frames.shape[1:3]
    return Row(
        expanded.ids, expanded.pictures.positions, learned(expanded.ids, writer), levels_of(medium), labels_of(scene.marks, height, width)
    )


def _not_seen(picture: Any) -> Any:
    raise AssertionError("training computes the features itself")


class PictureBatch(NamedTuple):
    """`ids` i64[B,T], padded at the end; `positions` i64[B,T,3]; `learned` bool[B,T]; `drawn`: their pictures, in order."""

    ids: Tensor
    positions: Tensor
    learned: Tensor
    drawn: Drawn


def batch_of(rows: Sequence[Row], size: tuple[int, int], multiple: int) -> PictureBatch:
    """Rows of pictures of one size. T is a multiple of `multiple`: fewer shapes for a compiler."""
    length = -(-max(len(one.ids) for one in rows) // multiple) * multiple
    ids = np.zeros((len(rows), length), np.int64)
    positions = np.zeros((len(rows), length, 3), np.int64)
    mask = np.zeros((len(rows), length), np.bool_)
    for i, one in enumerate(rows):
        ids[i, : len(one.ids)], positions[i, : len(one.ids)], mask[i, : len(one.ids)] = one.ids, one.positions, one.learned

    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(one.labels, name) for one in rows]))

    levels = torch.from_numpy(np.concatenate([one.levels for one in rows]))
    drawn = Drawn(size, levels, *(joined(name) for name in Labels.__dataclass_fields__))
    return PictureBatch(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(mask), drawn)


class PictureBatches(IterableDataset[PictureBatch]):
    """Conversations about pictures of one size per batch, the same for the same seeds. Each worker draws every so many-th batch."""

    def __init__(self, tokenizer: Path, rows: int, subjects: Subjects = EVERYTHING, first: int = 0, multiple: int = 16) -> None:
        self.tokenizer, self.rows, self.subjects, self.first, self.multiple = tokenizer, rows, subjects, first, multiple

    def __iter__(self) -> Iterator[PictureBatch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        torch.set_num_threads(1)
        writer, seed = open_writer(self.tokenizer), self.first + number
        while True:
            yield self.made(seed, writer)
            seed += count

    def made(self, seed: int, writer: Writer) -> PictureBatch:
        rng = random.Random(seed)
        seeds = range(seed * self.rows, (seed + 1) * self.rows)
        draw, subjects = rng.random(), self.subjects
        if draw < subjects.videos:
            scenes = [draw_video(one, 4 if draw < subjects.videos / 2 else 6) for one in seeds[: self.rows // 2]]
            return batch_of([row(scene, conversation(scene, rng), writer) for scene in scenes], VIDEO_SIZE, self.multiple)
        size = rng.choice(subjects.sizes)
        if draw < subjects.videos + subjects.tools:
            scenes = [draw_still(one, size, writer.words, {"one": 1}) for one in seeds[: self.rows // 4]]
            return batch_of([row(scene, tool_call(scene), writer, [REPORT_TOOL]) for scene in scenes], size, self.multiple)
        scenes = [draw_still(one, size, writer.words, subjects.topics) for one in seeds]
        return batch_of([row(scene, conversation(scene, rng), writer) for scene in scenes], size, self.multiple)


def asked_of(scene: Scene, wanted: str, rng: random.Random) -> Question:
    """A question of a kind in GOALS."""
    return next(question for question in questions(scene, rng) if question.asks == wanted)
