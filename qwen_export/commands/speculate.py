"""The option --speculate of the commands that generate."""

from __future__ import annotations

from typing import Any

import click

from qwen_export.runtimes.model import Speculate


class _Speculate(click.ParamType):
    """auto, off, lookup, or the length of every draft."""

    name = "auto|off|lookup|K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Speculate:
        text = str(value)
        if text.isdigit():
            return int(text)
        if text not in ("auto", "off", "lookup"):
            self.fail(f"{text!r} is none of auto, off, lookup or a number of tokens", param, ctx)
        return text


speculate_option = click.option(
    "--speculate",
    type=_Speculate(),
    default="auto",
    show_default=True,
    help="Draft with the bundle's head as far as it pays, not at all, from the text, or K tokens a round.",
)
