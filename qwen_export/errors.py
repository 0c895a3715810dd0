"""Every error that a user of qwen-export sees.

An error has five parts: what failed, where (file, tensor, layer, op, parameter), what was found, what was expected, and the edit or
command that fixes it. Exceptions of libraries (ONNX Runtime, protobuf, safetensors, TensorRT) are chained with `from`, never shown alone.

`what` and `fix` name parameters of the Python API in braces: "Lower {max_context}.". In Python the name is printed, and the command line
prints its flag (`commands/flags.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_PARAMETER = re.compile(r"\{([a-z_][a-z0-9_]*)\}")


REPORT = "This is a fault of qwen-export: report it, with config.json and the files of {dump_ir}."
"""The fix of errors that no input of a user should cause."""


class QwenExportError(Exception):
    """Base of all errors raised on purpose.

    `what` begins in lower case and has no full stop; `fix` is one or more whole sentences. Empty parts are left out of the message.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", got: object = "", expected: object = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        self.got, self.expected = str(got), str(expected)
        super().__init__(what)

    def __str__(self) -> str:
        return self.text()

    def text(self, parameter: Callable[[str], str] = str) -> str:
        """The message in one line. `parameter` gives the printed form of a parameter's name."""
        what, fix = (_PARAMETER.sub(lambda match: parameter(match[1]), part) for part in (self.what, self.fix))
        text = f"{what} ({self.where})" if self.where else what
        facts = [f"{name} {value}" for name, value in (("got", self.got), ("expected", self.expected)) if value]
        if facts:
            text += ": " + ", ".join(facts)
        # One line, whatever names and messages of others hold.
        return " ".join((f"{text}. {fix}" if fix else f"{text}.").splitlines())

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[QwenExportError], arguments: tuple[Any, ...], parts: dict[str, Any]) -> QwenExportError:
    """An error that was pickled: its constructor takes keywords, which pickle does not pass."""
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(parts)
    return error


class Interrupted(KeyboardInterrupt):
    """An interrupt that left something behind. `message` is what, and how to go on or to remove it."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


class ParameterError(QwenExportError, ValueError):
    """A parameter of a call has a value that it cannot have. `parameter` is its name in the Python API."""

    def __init__(self, what: str, *, parameter: str, where: str = "", got: object = "", expected: object = "", fix: str = "") -> None:
        self.parameter = parameter
        super().__init__(what, where=where, got=got, expected=expected, fix=fix)

    def text(self, parameter: Callable[[str], str] = str) -> str:
        name = parameter(self.parameter)
        said = super().text(parameter)
        return said if name in said else f"{name}: {said}"


class CheckpointError(QwenExportError):
    """The checkpoint directory cannot be read as a model of the family."""


class ConfigError(CheckpointError):
    """A value of config.json is missing, unknown or unsupported."""


class UnsupportedError(QwenExportError):
    """The target does not have what a build requires; raised before any weight is read."""


class BundleError(QwenExportError):
    """A bundle is damaged, incomplete, from a newer version, or not runnable on this machine."""


class BuildError(QwenExportError):
    """A build failed part-way; no bundle was left behind."""


class CaptureError(BuildError):
    """A graph broke one of its invariants while it was traced, translated or rewritten."""


class ContextOverflow(QwenExportError):
    """A request needs more tokens than the bundle's context holds."""


class OverloadedError(QwenExportError):
    """An engine has as many requests waiting as it may have."""


class TemplateError(QwenExportError):
    """The chat template refused the messages."""


class VerifyError(QwenExportError):
    """The compiled model is not the reference model."""
