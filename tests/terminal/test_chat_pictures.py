"""Pictures in a conversation: they belong to the next question, and stay with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_export.errors import QwenExportError
from qwen_export.runtimes import SamplingParams
from qwen_export.runtimes.vision.sight import Sight
from qwen_export.terminal.conversation import Conversation
from qwen_export.terminal.slash_commands import run_command
from tests.support.pictures import SPEC, encoded, photo
from tests.support.videos import sound, video


def seeing(asked: list[Any]) -> Any:
    """A model that reads pictures, as far as a conversation looks at one. Its questions are in `asked`."""

    def stream(messages: Any, **options: Any) -> Any:
        asked.append(messages)
        return SimpleNamespace(content="A dot.", reasoning="", statistics=None)

    template = SimpleNamespace(thinks_by_default=lambda: False)
    manifest = SimpleNamespace(graphs={"vision": None}, vision=SPEC)
    sight = Sight.__new__(Sight)
    sight.spec, sight.encoder = SPEC, SimpleNamespace(tower=SimpleNamespace(largest=None))  # type: ignore[assignment]
    return SimpleNamespace(manifest=manifest, template=template, recommended=lambda thinks: SamplingParams(), stream=stream, sight=sight)


def test_a_picture_goes_with_the_next_question(tmp_path: Path) -> None:
    picture, asked = tmp_path / "a.png", []  # type: tuple[Path, list[Any]]
    picture.write_bytes(encoded(photo(40, 40)))
    conversation = Conversation(seeing(asked))
    assert run_command(conversation, f"/image {picture}") == "1 picture for the next question"
    conversation.record(conversation.ask("What is it?", lambda done, total: None))
    conversation.record(conversation.ask("Sure?", lambda done, total: None))
    parts = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "What is it?"}]
    assert [message["content"] for message in asked[1]] == [parts, "A dot.", "Sure?"]
    saved = tmp_path / "c.json"
    conversation.save(saved)
    again = Conversation(seeing([]))
    again.load(saved)
    assert again.all_messages() == conversation.all_messages()


def test_a_picture_that_is_not_there_is_not_attached(tmp_path: Path) -> None:
    conversation = Conversation(seeing([]))
    with pytest.raises(QwenExportError, match="no such file"):
        run_command(conversation, f"/image {tmp_path / 'none.png'}")
    assert conversation.attached == []


def test_a_file_that_cannot_be_read_is_not_attached(tmp_path: Path) -> None:
    """At once, and with its name: the question would be typed in vain."""
    conversation = Conversation(seeing([]))
    for command, name, data, message in (
        ("image", "a.png", b"no picture", "format that is not read"),
        ("image", "b.png", encoded(photo(40, 40))[:300], "damaged"),
        ("video", "c.mp4", sound(), "holds no video"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(QwenExportError, match=f"{message}.*{name}|{name}.*{message}"):
            run_command(conversation, f"/{command} {tmp_path / name}")
    assert conversation.attached == []


def test_pictures_and_videos_are_counted(tmp_path: Path) -> None:
    conversation = Conversation(seeing([]))
    for name, data in (("a.png", encoded(photo(40, 40))), ("b.mp4", video(8))):
        (tmp_path / name).write_bytes(data)
    run_command(conversation, f"/image {tmp_path / 'a.png'}")
    assert run_command(conversation, f"/video {tmp_path / 'b.mp4'}") == "1 picture and 1 video for the next question"


def test_a_question_that_failed_takes_its_pictures_with_it(tmp_path: Path) -> None:
    """Else each question after it would fail, too."""
    picture = tmp_path / "a.png"
    picture.write_bytes(encoded(photo(40, 40)))
    model = seeing([])
    conversation = Conversation(model)
    run_command(conversation, f"/image {picture}")

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise QwenExportError("the picture cannot be read", fix="Give another one.")

    model.stream = refuse
    with pytest.raises(QwenExportError, match="cannot be read"):
        conversation.ask("What is it?", lambda done, total: None)
    assert conversation.attached == [] and conversation.messages == []
