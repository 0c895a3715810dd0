"""The options of commands that take a checkpoint by its name on a hub, as one decorator."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from qwen_export.commands.output import is_quiet
from qwen_export.downloads.hub_options import HUBS, HubOptions

_OPTIONS = (
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a checkpoint that is named by its id on a hub."),
    click.option("--hub", type=click.Choice(HUBS), default="huggingface", show_default=True, help="Where ids are looked up."),
    click.option("--offline", is_flag=True, help="Take a checkpoint from the hub's cache only."),
)


def hub_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options, as one argument `hub_access` of the command."""

    @wraps(command)
    def called(*arguments: Any, **values: Any) -> Any:
        access = HubOptions(values.pop("hub"), values.pop("revision"), values.pop("offline"), not is_quiet())
        return command(*arguments, hub_access=access, **values)

    for option in reversed(_OPTIONS):
        called = option(called)
    return called
