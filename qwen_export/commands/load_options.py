"""The options of commands that load a bundle, as one decorator. They reach the command as one argument, `loading`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from qwen_export.bundle_contract import RUNTIMES
from qwen_export.commands.param_types import Gigabytes, Numbers, Speculation

_DEVICE = click.option(
    "--device", type=click.Choice(["cpu", "cuda", "dml"]), help="Run on another device than the bundle is for, where its operators allow."
)
_RUNTIME = click.option("--runtime", type=click.Choice(RUNTIMES), help="What runs a bundle of target onnx.")
_DEVICE_ID = click.option("--device-id", type=click.IntRange(0, 1023), default=0, metavar="N", help="Which GPU, from 0.")
_DEVICES = click.option(
    "--devices", type=Numbers(least=0), default=(), metavar="N,N,...", help="Which GPUs, for the stages of a bundle that has several."
)
_NATIVE = click.option(
    "--native/--no-native",
    "native",
    default=None,
    help="Load the bundle's native library, or refuse it. Default: load it, with a notice where no build of yours made it.",
)
_SPEED = (
    click.option("--threads", type=int, metavar="N", help="CPU threads; default one per core."),
    click.option("--repack", is_flag=True, help="CPU: copy the weights into the order of the kernels: slower load, faster steps."),
    click.option(
        "--weight-budget",
        type=Gigabytes(),
        metavar="GB",
        help="GPU memory for the weights of a bundle built with --weight-streaming or --host-experts, in 10^9 bytes; "
        "the rest stays in host memory.",
    ),
    click.option(
        "--speculate",
        type=Speculation(),
        default="auto",
        show_default=True,
        help="Draft with the bundle's head as far as it pays, not at all, from the text, or K tokens a round.",
    ),
)


def load_options(*, speed: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options, as `loading`: keyword arguments of `runtimes.load`. `speed`: with those that change speed and memory only."""
    names = ("device", "runtime", "device_id", "devices", "native", *(("threads", "repack", "weight_budget", "speculate") if speed else ()))

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def called(*arguments: Any, **values: Any) -> Any:
            loading = {name: values.pop(name) for name in names}
            loading["native"] = {None: None, True: "allow", False: "refuse"}[loading["native"]]
            return command(*arguments, loading=loading, **values)

        for option in reversed((*(_SPEED if speed else ()), _DEVICE, _RUNTIME, _DEVICE_ID, _DEVICES, _NATIVE)):
            called = option(called)
        return called

    return decorate
