"""Running a file of requests: many at once, answers in the order of the requests, and where it stopped it goes on."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen_export.errors import QwenExportError
from qwen_export.runtimes.answer import Generation
from qwen_export.runtimes.model import Model
from qwen_export.runtimes.serving.batch_file import Answered, Line, answer_line, error_line, prepare, read_line
from qwen_export.runtimes.serving.batch_options import answer_count
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.structured.answer_events import TokenLogprob

_AHEAD = 16
"""Requests per slot that may be queued: answers that end early wait for those before them."""

Done = Callable[[dict[str, Any]], None]
"""Called with the line of an answer, empty for one of an earlier run."""


def finished_lines(answers: Path) -> list[str | None]:
    """The names of the requests that an interrupted run has answered. Half a line at the end is cut off."""
    if not answers.exists():
        return []
    names: list[str | None] = []
    whole = 0
    with answers.open("rb") as file:
        for text in file:
            try:
                fields = json.loads(text)
            except ValueError:
                break
            if not text.endswith(b"\n") or not isinstance(fields, dict) or "response" not in fields:
                break
            names.append(fields.get("custom_id"))
            whole += len(text)
        size = file.seek(0, 2)
        file.seek(whole)
        rest = file.read()
    if b"\n" in rest:
        raise QwenExportError(
            "the file of answers is not one of this command",
            where=f"{answers}, line {len(names) + 1}",
            fix="Give another name, or move the file away.",
        )
    if size > whole:
        with answers.open("r+b") as file:
            file.truncate(whole)
    return names


def run_batch(model: Model, engine: Engine, requests: Path, answers: Path, slots: int, done: Done = lambda line: None) -> None:
    """Answer every line of `requests` that has no answer in `answers`."""
    finished = finished_lines(answers)
    waiting: deque[tuple[Line, list[Generation] | QwenExportError]] = deque()
    with answers.open("a", encoding="utf-8") as out:

        def write() -> None:
            line, answer = waiting.popleft()
            made = _result(line, answer)
            out.write(json.dumps(made, ensure_ascii=False) + "\n")
            out.flush()
            done(made)

        for line in _lines(requests):
            if line.number <= len(finished):
                if line.custom_id != finished[line.number - 1]:
                    raise QwenExportError(
                        "the answers belong to other requests",
                        where=f"{answers}, line {line.number}",
                        got=repr(finished[line.number - 1]),
                        expected=repr(line.custom_id),
                        fix="Give another name for the answers, or move the file away.",
                    )
                done({})
                continue
            waiting.append((line, _start(model, engine, line)))
            while len(waiting) >= slots * _AHEAD:
                write()
        while waiting:
            write()


def _lines(requests: Path) -> Iterator[Line]:
    """Lines of the file, those that are empty left out."""
    number = 0
    with requests.open("rb") as file:
        for data in file:
            text = data.decode("utf-8", errors="replace").strip("\ufeff \t\r\n")
            if text:
                number += 1
                yield read_line(number, text)


def _start(model: Model, engine: Engine, line: Line) -> list[Generation] | QwenExportError:
    try:
        return engine.answers(prepare(model, line), answer_count(line.body or {}))
    except QwenExportError as error:
        return error
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # a body of a shape that no check foresaw
        return QwenExportError("the request cannot be read", got=f"{type(error).__name__}: {error}", fix="Correct the body.")


def _result(line: Line, answers: list[Generation] | QwenExportError) -> dict[str, Any]:
    if isinstance(answers, QwenExportError):
        return error_line(line, answers)
    ended = []
    for answer in answers:
        tokens: list[TokenLogprob] = []
        try:
            for event in answer.events():
                tokens += event.tokens
        except QwenExportError as error:
            if answer.statistics.finish != "overflow" or not answer.tokens:
                return error_line(line, error, 400 if answer.statistics.finish == "overflow" else 500)
        ended.append(Answered(answer, tokens))
    return answer_line(line, ended)
