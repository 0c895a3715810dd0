"""The command line: `qwen-export COMMAND`. Each command is a file in qwen_export/commands, imported when it is called.

A command's file imports ground modules and click at its top, and the rest when it runs: help and completion work in every installation.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import logging
import os
import signal
import sys
from types import FrameType
from typing import Any

import click

from qwen_export import __version__
from qwen_export.commands.examples import epilog
from qwen_export.commands.flags import flag
from qwen_export.errors import Interrupted, QwenExportError
from qwen_export.extras import missing_extra

COMMANDS = ("inspect", "build", "verify", "run", "chat", "serve", "batch", "bench", "check", "package", "rebuild", "completion")
INTERRUPTED, BROKEN_PIPE = 130, 141
"""Exit codes of shells for a process that SIGINT or SIGPIPE has ended."""


class _Notices(logging.Handler):
    """Warnings of the runtime, as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{record.levelname.lower()}: {record.getMessage()}", err=True)


class _LazyGroup(click.Group):
    """Imports a command's module when the command is used: `inspect` must not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"qwen_export.commands.{name}").command
        command.epilog = epilog(name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        # click would exit with 1 for the first, and lose the message of the second.
        except BrokenPipeError as error:
            raise _ReaderGone from error
        except KeyboardInterrupt as error:
            raise _Stopped(error.message if isinstance(error, Interrupted) else "") from error


class _ReaderGone(Exception):
    """The process that reads stdout has ended."""


class _Stopped(Exception):
    """SIGINT or SIGTERM."""


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qwen-export")
def group() -> None:
    """Compile Qwen3.5 / Qwen3.6 checkpoints into verified bundles that run without PyTorch."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. An expected failure is one line on stderr and exit code 1, wrong usage 2, an interrupt 130, and a reader of the output
    that has gone 141 without a message."""
    signal.signal(signal.SIGTERM, _terminate)
    _print_utf8()
    logger = logging.getLogger("qwen_export")
    logger.handlers, logger.propagate = [_Notices()], False
    try:
        group.main(arguments, prog_name="qwen-export", standalone_mode=False)
    except QwenExportError as error:
        _fail(error.text(flag), error.exit_code)
    except ModuleNotFoundError as error:
        message = missing_extra(error, "this command")
        if message is None:
            raise
        _fail(message.text(flag))
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except _Stopped as stopped:
        click.echo(f"interrupted: {stopped}" if str(stopped) else "interrupted", err=True)
        sys.exit(INTERRUPTED)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except _ReaderGone:
        _drop_output()
        sys.exit(BROKEN_PIPE)
    except MemoryError:
        _fail("the machine has too little memory for this. Give a smaller --max-context, or free memory.")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            _drop_output()
            _fail("the output cannot be written: the device is full. Free space, or write to another one.")
        place = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{place}. Check the path, its permissions and the space on the disk.")


def _print_utf8() -> None:
    """Files and pipes get UTF-8, as they are read. Windows' own encoding there is a code page that has few characters, and an answer would
    end with an error at the first one that it lacks."""
    if sys.flags.ignore_environment or not os.environ.get("PYTHONIOENCODING"):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
                stream.reconfigure(encoding="utf-8")


def _fail(message: str, code: int = 1) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def _drop_output() -> None:
    """What is still in the buffer of stdout cannot be written: without this the interpreter would try again when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(signum: int, frame: FrameType | None) -> Any:
    """SIGTERM unwinds like an interrupt, so that nothing half-written stays behind."""
    raise KeyboardInterrupt
