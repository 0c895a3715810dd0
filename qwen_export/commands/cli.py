"""The command line: `qwen-export COMMAND`. Each command is a file in qwen_export/commands, imported when it is called."""

from __future__ import annotations

import importlib
import signal
import sys
from types import FrameType
from typing import Any

import click

from qwen_export import __version__
from qwen_export.commands.flags import flag
from qwen_export.errors import QwenExportError

COMMANDS = ("inspect", "build", "verify", "run", "bench", "check", "package", "rebuild")


class _LazyGroup(click.Group):
    """Imports a command's module when the command is used: `inspect` must not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"qwen_export.commands.{name}").command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qwen-export")
def group() -> None:
    """Compile Qwen3.5 / Qwen3.6 checkpoints into verified bundles that run without PyTorch."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. An expected failure is one line on stderr and exit code 1; an interrupt is 130."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        group.main(arguments, standalone_mode=False)
    except QwenExportError as error:
        click.echo(f"error: {error.text(flag)}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        click.echo(f"error: {error.strerror or error} ({error.filename}).", err=True)
        sys.exit(1)


def _terminate(signum: int, frame: FrameType | None) -> Any:
    """SIGTERM unwinds like an interrupt, so that nothing half-written stays behind."""
    raise KeyboardInterrupt
