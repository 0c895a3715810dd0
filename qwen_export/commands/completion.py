"""qwen-export completion"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_QWEN_EXPORT_COMPLETE"
"""By this variable the script asks the program what could follow; click derives it from the program's name."""


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print a script that completes commands, options and file names in SHELL.

    The script runs qwen-export when the tab key is pressed, so it stays right when the version changes.
    """
    completion = get_completion_class(shell)
    assert completion is not None, "click has these shells"
    click.echo(completion(context.find_root().command, {}, "qwen-export", VARIABLE).source())
