"""Pictures in a conversation: they belong to the next question, and stay with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_export.errors import QwenExportError
from qwen_export.runtimes import SamplingParams
from qwen_export.terminal.conversation import Conversation
from qwen_export.terminal.slash_commands import run_command


def seeing(asked: list[Any]) -> Any:
    """A model that reads pictures, as far as a conversation looks at one. Its questions are in `asked`."""

    def stream(messages: Any, **options: Any) -> Any:
        asked.append(messages)
        return SimpleNamespace(content="A dot.", reasoning="", statistics=None)

    template = SimpleNamespace(thinks_by_default=lambda: False)
    manifest = SimpleNamespace(graphs={"vision": None})
    return SimpleNamespace(manifest=manifest, template=template, recommended=lambda thinks: SamplingParams(), stream=stream)


def test_a_picture_goes_with_the_next_question(tmp_path: Path) -> None:
    picture, asked = tmp_path / "a.png", []  # type: tuple[Path, list[Any]]
    picture.write_bytes(b"png")
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
    assert conversation.pictures == []


def test_a_question_that_failed_takes_its_pictures_with_it(tmp_path: Path) -> None:
    """Else each question after it would fail, too."""
    picture = tmp_path / "a.png"
    picture.write_bytes(b"no picture")
    model = seeing([])
    conversation = Conversation(model)
    run_command(conversation, f"/image {picture}")

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise QwenExportError("the picture cannot be read", fix="Give another one.")

    model.stream = refuse
    with pytest.raises(QwenExportError, match="cannot be read"):
        conversation.ask("What is it?", lambda done, total: None)
    assert conversation.pictures == [] and conversation.messages == []
