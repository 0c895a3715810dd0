"""--device-memory: the GPUs that a build is planned for."""

from __future__ import annotations

import click

from qwen_export.commands.param_types import Gigabytes

device_memory_option = click.option(
    "--device-memory",
    type=Gigabytes(least=0.1),
    metavar="GB",
    help="Memory of each GPU that the bundle will run on, in 10^9 bytes; default that of this machine's. It decides the number of stages.",
)
