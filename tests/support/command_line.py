"""The command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_export.commands.cli import main


def caller(capture: pytest.CaptureFixture[Any], errors: str = "strict") -> Callable[..., tuple[int, str, str]]:
    """A function that runs a command; it returns exit code, stdout and stderr. `errors`: of bytes that are not UTF-8."""

    def text(shown: str | bytes) -> str:
        return shown if isinstance(shown, str) else shown.decode("utf-8", errors)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capture.readouterr()
        return code, text(out), text(err)

    return call
