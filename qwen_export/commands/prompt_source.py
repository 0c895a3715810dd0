"""Where a prompt comes from: the command line, a file, or stdin."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import click

from qwen_export.errors import ParameterError

LARGEST = 64 << 20
"""Bytes of a prompt. A context of a million tokens is some five megabytes of text."""


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The text of PROMPT, where `-` is stdin and `@FILE` a file, or of --prompt-file."""
    if prompt is None and prompt_file is None and _piped():
        prompt = "-"
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give PROMPT, or --prompt-file FILE, and not both")
    if prompt_file is not None:
        return read_text(prompt_file, "prompt_file")
    assert prompt is not None
    if prompt == "-":
        return _decoded(sys.stdin.buffer.read(LARGEST + 1), "stdin", "prompt")
    if prompt.startswith("@") and len(prompt) > 1:
        return read_text(Path(prompt[1:]), "prompt")
    # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
    return _decoded(prompt.encode("utf-8", "surrogateescape"), "the command line", "prompt")


def _piped() -> bool:
    """Whether stdin is a pipe or a file: a prompt that was not named is there."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(kind) or stat.S_ISREG(kind)


def read_text(path: Path, parameter: str) -> str:
    """A text file in UTF-8. `parameter` names it in messages."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise ParameterError(
            "the text file cannot be read", parameter=parameter, where=str(path), got=error.strerror, fix="Check the path."
        ) from error
    return _decoded(data, str(path), parameter)


def _decoded(data: bytes, where: str, parameter: str) -> str:
    if len(data) > LARGEST:
        raise ParameterError(
            "the text is too long", parameter=parameter, where=where, expected=f"at most {LARGEST >> 20} MiB", fix="Give a shorter text."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ParameterError(
            "the text is not UTF-8",
            parameter=parameter,
            where=where,
            got=f"byte 0x{data[error.start]:02x} at {error.start}",
            fix="Convert it, for example with iconv -t UTF-8.",
        ) from error
