"""A conversation with one model: its messages and settings, and the file that it is saved to."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_export.errors import ParameterError, QwenExportError

if TYPE_CHECKING:
    from qwen_export.runtimes.decoding.generation import Statistics
    from qwen_export.runtimes.model import Generation, Model

LARGEST_FILE = 64 << 20
"""Bytes of a saved conversation that is loaded."""


@dataclass
class Conversation:
    """`sampling`: fields of `SamplingParams` that the caller chose, over the recommended ones. `options`: other arguments of
    `Model.stream`. `messages` hold no system message; `system` has it. `thinking` None is the default of the template."""

    model: Model
    sampling: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    thinking: bool | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    attached: list[dict[str, str]] = field(default_factory=list)
    """Pictures and videos that the next question is about, as parts of a message."""
    statistics: Statistics | None = None
    """Of the last answer."""
    _asked: dict[str, Any] = field(default_factory=dict)

    @property
    def sees(self) -> bool:
        """Whether the model reads pictures."""
        return self.model.manifest.vision is not None

    def attach(self, kind: str, path: Path) -> None:
        """A picture or video file for the next question. Raises QwenExportError for one that cannot be read."""
        part = {"type": kind, kind: str(path.resolve())}
        sight = self.model.sight
        if sight is not None:
            sight.check(part, self.options.get("media"))
        self.attached.append(part)

    def ask(self, question: str, progress: Callable[[int, int], None]) -> Generation:
        """Begin the answer to a question about what was attached before. Nothing is kept of it before `record`."""
        self._asked = self._question(question)
        self.attached = []
        messages = [*self.all_messages(), self._asked]
        thinks = self.thinking if self.thinking is not None else self.model.template.thinks_by_default()
        sampling = dataclasses.replace(self.model.recommended(thinks), **self.sampling)
        return self.model.stream(messages, enable_thinking=self.thinking, sampling=sampling, progress=progress, **self.options)

    def _question(self, text: str) -> dict[str, Any]:
        return {"role": "user", "content": [*self.attached, {"type": "text", "text": text}] if self.attached else text}

    def record(self, generation: Generation) -> None:
        """Keep the last question with what there is of its answer; a question without any is dropped."""
        self.statistics = generation.statistics
        if not (generation.content or generation.reasoning):
            return
        answer = {"role": "assistant", "content": generation.content}
        if generation.reasoning:
            answer["reasoning_content"] = generation.reasoning
        self.messages += [self._asked, answer]

    def all_messages(self) -> list[dict[str, Any]]:
        """The system message, where there is one, and all others."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    def reset(self) -> None:
        """Forget questions and answers. The settings stay."""
        self.messages, self.attached, self.statistics = [], [], None

    def save(self, path: Path) -> None:
        """Write a JSON file in the form of a chat request: `messages`, and `enable_thinking` where it was chosen. The file appears whole,
        or what was there stays; a file that is no conversation is not replaced. Raises QwenExportError."""
        if path.exists():
            _require_conversation(path)
        saved: dict[str, Any] = {"messages": self.all_messages()}
        if self.thinking is not None:
            saved["enable_thinking"] = self.thinking
        try:
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    json.dump(saved, file, indent=1, ensure_ascii=False)
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
        except (OSError, ValueError) as error:
            raise QwenExportError(
                "the conversation cannot be saved", where=str(path), got=_reason(error), fix="Give another path."
            ) from error

    def load(self, path: Path) -> None:
        """Go on with a conversation from `save`, or with the messages of any chat request. Raises QwenExportError, and nothing changes
        then."""
        saved = _read(path)
        messages = _messages_of(saved, path)
        system = messages[0].get("content") if messages[0]["role"] == "system" else None
        if system is not None and not isinstance(system, str):
            system = "".join(part.get("text", "") for part in system)
        thinking = saved.get("enable_thinking", self.thinking) if isinstance(saved, dict) else self.thinking
        self.system, self.thinking, self.statistics = system, thinking if isinstance(thinking, bool) else None, None
        self.messages = [dict(message) for message in messages[messages[0]["role"] == "system" :]]


def _messages_of(saved: Any, path: Path) -> list[Any]:
    from qwen_export.runtimes.text.chat_messages import check_messages

    messages: Any = saved.get("messages") if isinstance(saved, dict) else saved
    try:
        check_messages(messages)
    except ParameterError as error:
        raise _unusable(path, f"{error.what} ({error.got})") from error
    assert isinstance(messages, list)
    return messages


def _require_conversation(path: Path) -> None:
    try:
        saved = _read(path)
        if not isinstance(saved, dict) or saved.get("messages") != []:
            _messages_of(saved, path)
    except QwenExportError as error:
        raise QwenExportError(
            "the file exists, and is no conversation",
            where=str(path),
            got=error.got,
            fix="Give another name, or remove the file.",
        ) from error


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) <= LARGEST_FILE:
            return json.loads(data)
        reason = f"more than {LARGEST_FILE >> 20} MiB"
    except (OSError, ValueError, RecursionError) as error:
        reason = _reason(error)
    raise _unusable(path, reason)


def _unusable(path: Path, reason: str) -> QwenExportError:
    return QwenExportError(
        "the conversation cannot be loaded",
        where=str(path),
        got=reason,
        expected="a JSON file with messages",
        fix="Give a file that /save wrote.",
    )


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
