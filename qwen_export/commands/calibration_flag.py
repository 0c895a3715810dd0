"""--calibrate, of `build` and `inspect`."""

from __future__ import annotations

import click

from qwen_export.targets import BUILT_IN_TEXT

calibration_option = click.option(
    "--calibrate",
    is_flag=False,
    flag_value=BUILT_IN_TEXT,
    default=None,
    metavar="[FILE]",
    help="With int4: choose codes so that the model keeps its answers to this text, or to a built-in one. Takes as long as reading the "
    "text takes.",
)
