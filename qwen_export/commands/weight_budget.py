"""The option --weight-budget of the commands that load a bundle."""

from __future__ import annotations

import click


def _bytes(context: click.Context, option: click.Parameter, value: float | None) -> int | None:
    return None if value is None else int(value * 1e9)


weight_budget_option = click.option(
    "--weight-budget",
    type=click.FloatRange(min=0),
    callback=_bytes,
    metavar="GB",
    help="GPU memory for the weights of a bundle built with --weight-streaming, in 10^9 bytes; the rest stays in host memory.",
)
