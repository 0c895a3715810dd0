"""Every error a user of qwen-export sees.

An error says five things: what failed, where (file, tensor, layer, op), what was found, what was expected, and the command, flag or
edit that fixes it. Exceptions of the libraries below us (ONNX Runtime, protobuf, safetensors, TensorRT) are chained with `from`, never
shown alone.
"""

from __future__ import annotations


class QwenExportError(Exception):
    """Base of all errors raised on purpose.

    `what` is a full sentence without its full stop. The other parts may be empty; `str()` leaves out what is empty.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", got: object = "", expected: object = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        self.got, self.expected = str(got), str(expected)
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.what} ({self.where})" if self.where else self.what
        facts = [f"{name} {value}" for name, value in (("got", self.got), ("expected", self.expected)) if value]
        if facts:
            text += ": " + ", ".join(facts)
        # One line, whatever names and messages of others hold.
        return " ".join((f"{text}. {self.fix}" if self.fix else f"{text}.").splitlines())


class CheckpointError(QwenExportError):
    """The checkpoint directory cannot be read as a model of the family."""


class ConfigError(CheckpointError):
    """A value of config.json is missing, unknown or unsupported."""


class UnsupportedError(QwenExportError):
    """The target cannot do what was asked; raised before any weight is read."""


class BundleError(QwenExportError):
    """A bundle is damaged, incomplete, from a newer version, or not runnable on this machine."""


class BuildError(QwenExportError):
    """A build failed part-way; no bundle was left behind."""


class CaptureError(BuildError):
    """A graph broke one of its invariants while it was traced, translated or rewritten."""


class ContextOverflow(QwenExportError):
    """A request needs more tokens than the bundle's context holds."""


class TemplateError(QwenExportError):
    """The chat template refused the messages."""


class VerifyError(QwenExportError):
    """The compiled model is not the reference model."""
