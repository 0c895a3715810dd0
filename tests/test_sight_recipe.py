"""The recipe of the demo that sees: what is drawn and asked, and that the training module is the model that is exported."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder, load_tower
from qwen_export.runtimes.vision.patch_positions import patch_positions

RECIPE = Path(__file__).parents[1] / "examples" / "train_demo"
TOKENIZER = RECIPE.parent / "demo-dense" / "tokenizer.json"
TOPICS = ("one", "many", "two", "text", "chart", "video")


@pytest.fixture(scope="module")
def recipe() -> Iterator[Any]:
    """A module of the recipe by its name. They are scripts of one folder, which import each other by bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPE))
        yield importlib.import_module


def scene(recipe: Any, topic: str, seed: int) -> Any:
    marks, chats = recipe("picture_marks"), recipe("picture_chats")
    if topic == "video":
        return marks.draw_video(seed)
    return marks.draw_still(seed, (64, 96), chats.open_writer(TOKENIZER).words, {topic: 1})


@pytest.mark.parametrize("topic", TOPICS)
def test_a_seed_draws_the_same_pixels_and_another_one_others(recipe: Any, topic: str) -> None:
    first, again, other = (scene(recipe, topic, seed) for seed in (7, 7, 8))
    assert np.array_equal(first.frames, again.frames) and first.facts == again.facts and first.marks == again.marks
    assert not np.array_equal(first.frames, other.frames)


@pytest.mark.parametrize("topic", TOPICS)
def test_marks_are_where_something_is_drawn(recipe: Any, topic: str) -> None:
    drawn = scene(recipe, topic, 11)
    labels = recipe("picture_marks").labels_of(drawn.marks, *drawn.frames.shape[1:3])
    assert (labels.kinds > 0).sum() == sum(len(marks) for marks in drawn.marks)
    assert np.abs(labels.offsets).max() <= 0.51
    if topic == "one":
        (mark,) = drawn.marks[0]
        frame = drawn.frames[0].astype(int)
        center = frame[int(mark.y), int(mark.x)] if mark.kind != "ring" else frame[int(mark.y - 0.8 * 8), int(mark.x)]
        assert mark.kind == "ring" or np.abs(center - recipe("scenes").COLORS[mark.color]).max() <= 13


def test_every_color_has_a_ground_it_is_seen_on(recipe: Any) -> None:
    scenes = recipe("scenes")
    for seed in range(300):
        for draw in scenes.STILLS.values():
            frame = draw(64, 64, random.Random(seed)).frames
            assert frame.max(axis=(0, 1, 2)).astype(int).max() - frame.min() > 80


def test_pictures_of_evaluation_have_words_that_training_never_shows(recipe: Any) -> None:
    marks, chats = recipe("picture_marks"), recipe("picture_chats")
    words = chats.open_writer(TOKENIZER).words
    assert len(words.new) > 50 and not set(words.new) & set(words.known)
    new = [marks.draw_still(marks.HELD_OUT + i, (64, 96), words, {"text": 1}).facts["text"] for i in range(50)]
    assert all(len(text) == 4 and (text.isdigit() or text in words.new) for text in new)
    shown = {marks.draw_still(i, (64, 96), words, {"text": 1}).facts["text"] for i in range(400)}
    assert sum(text in words.known for text in shown) > 50


def test_levels_are_the_rows_that_the_runtime_gives_to_the_tower(recipe: Any) -> None:
    marks = recipe("picture_marks")
    medium = marks.prepared(scene(recipe, "two", 3))
    levels = torch.from_numpy(marks.levels_of(medium))
    rows = torch.from_numpy(medium.picture.rows(marks.seeing()))
    assert torch.equal((levels.float() - 127.5) / 127.5, rows)


@pytest.mark.parametrize("topic", TOPICS)
def test_the_model_learns_what_the_assistant_writes_and_nothing_else(recipe: Any, topic: str) -> None:
    chats = recipe("picture_chats")
    writer = chats.open_writer(TOKENIZER)
    for seed in range(12):
        drawn = scene(recipe, topic, seed)
        messages = chats.conversation(drawn, random.Random(seed))
        row = chats.row(drawn, messages, writer)
        written = writer.tokenizer.decode([i for i, learn in zip(row.ids, row.learned, strict=True) if learn], skip_special_tokens=False)
        turns = [message for message in messages if message["role"] == "assistant"]
        thought = turns[-1]["reasoning_content"]
        before = f"{thought}\n</think>\n\n" if thought else ""
        assert written == before + "".join(f"{turn['content']}<|im_end|>" for turn in turns)
        placeholders = sum(i in (chats.seeing().image_token, chats.seeing().video_token) for i in row.ids)
        assert placeholders == row.levels.shape[0] * row.levels.shape[1] // 4


def test_questions_are_answered_from_the_facts(recipe: Any) -> None:
    asked = recipe("picture_questions")
    drawn = recipe("scenes").Scene("one", np.zeros((1, 64, 64, 3), np.uint8), {"kind": "star", "color": "red", "place": "left"})
    found = {question.asks: question.answer for question in asked.questions(drawn, random.Random(0))}
    assert found == {"color": "It is red.", "shape": "It is a star.", "place": "It is on the left.", "all": "A red star on the left."}


def test_the_exported_checkpoint_computes_what_was_trained(recipe: Any, tmp_path: Path) -> None:
    chats, seeing = recipe("picture_chats"), recipe("picture_marks").seeing()
    torch.manual_seed(0)
    state = recipe("seeing").SeeingQwen(recipe("picture_marks").family_config()).state_dict()
    net = recipe("export_sight").write(state, TOKENIZER.parent, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 12_000_000 + 16_000_000
    drawn = scene(recipe, "two", 5)
    row = chats.row(drawn, chats.conversation(drawn, random.Random(5)), chats.open_writer(TOKENIZER))
    batch = chats.batch_of([row], drawn.frames.shape[1:3], 1)
    with torch.no_grad():
        features = net.features(batch.drawn)
        trained = net.logits(net.hidden_of(*net.seen(batch, features))[1])[0]

    checkpoint = open_checkpoint(tmp_path)
    rows, columns = (side // seeing.patch_size for side in batch.drawn.size)
    places = [torch.from_numpy(values.copy()) for values in patch_positions(rows, columns, seeing).values()]
    pixels = torch.from_numpy(recipe("picture_marks").prepared(drawn).picture.rows(seeing))
    with torch.no_grad():
        seen = load_tower(checkpoint)(pixels.unflatten(1, (-1, seeing.merge_size**2)), *places)
    torch.testing.assert_close(features, seen, rtol=1e-4, atol=1e-5)
    sequence = EagerSequence(load_decoder(checkpoint), len(row.ids))
    sequence.place(row.positions)
    at = np.flatnonzero(np.array(row.ids) == seeing.image_token)
    computed = sequence.read(row.ids, seen[0].numpy(), at)
    np.testing.assert_allclose(computed[row.learned], trained[torch.from_numpy(row.learned)].numpy(), atol=1e-4)
