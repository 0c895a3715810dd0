"""The options of commands that compile engines, as one decorator."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from qwen_export.commands.param_types import Gigabytes
from qwen_export.engine_options import BOUND, ENGINE_WEIGHTS, HARDWARE_COMPATIBILITY, PLUGINS, TILING, EngineOptions

_OPTIONS = (
    click.option("--sm", metavar="LIST", help="Compute capabilities to build for, like 89,120; default: the GPU that is there."),
    click.option(
        "--hardware-compat",
        type=click.Choice(list(HARDWARE_COMPATIBILITY)),
        default="none",
        show_default=True,
        help="Other GPUs that the engines run on, too (not RTX).",
    ),
    click.option("--version-compat", is_flag=True, help="Engines that later versions of TensorRT run, too (not RTX)."),
    click.option("--opt-level", type=click.IntRange(0, 5), metavar="0..5", help="How long TensorRT looks for faster kernels; default 3."),
    click.option("--workspace", type=Gigabytes(), metavar="GB", help="Scratch memory that kernels may use, in 10^9 bytes; default: all."),
    click.option("--aux-streams", type=click.IntRange(min=0), metavar="N", help="Streams of a call besides the first one."),
    click.option(
        "--tiling-level",
        type=click.Choice(list(TILING)),
        default="none",
        show_default=True,
        help="How long TensorRT looks for products that stay in the L2 cache (not RTX).",
    ),
    click.option("--timing-cache", type=click.Path(path_type=Path), metavar="FILE", help="Read and keep what kernels took (not RTX)."),
    click.option("--weight-streaming", is_flag=True, help="Engines that can leave embedded weights in host memory (run --weight-budget)."),
    click.option("--tf32", is_flag=True, help="Let fp32 products round their operands to 10 bits."),
    click.option("--layer-dump", type=click.Path(path_type=Path), metavar="DIR", help="Write the layers of each engine."),
)
_BUILD_ONLY = (
    click.option(
        "--engine-weights",
        type=click.Choice(list(ENGINE_WEIGHTS)),
        default=BOUND,
        show_default=True,
        help="Weights: " + "; ".join(f"{name}: {meaning}" for name, meaning in ENGINE_WEIGHTS.items()) + ".",
    ),
    click.option(
        "--plugin",
        multiple=True,
        type=click.Choice(PLUGINS),
        help="Short calls of this op on our own kernel, as a plugin inside the engine; TensorRT-RTX from 1.7 on.",
    ),
    click.option("--carry-onnx", is_flag=True, help="Put the graphs into the bundle, for `qwen-export rebuild` on another machine."),
)


def engine_options(*, rebuilding: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options, which reach the command as one argument: `engine`, an EngineOptions. `rebuilding`: without what a bundle has decided."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def called(*arguments: Any, **values: Any) -> Any:
            engine = EngineOptions(
                sms=compute_capabilities(values.pop("sm")),
                hardware_compatibility=values.pop("hardware_compat"),
                version_compatible=values.pop("version_compat"),
                opt_level=values.pop("opt_level"),
                workspace=values.pop("workspace"),
                aux_streams=values.pop("aux_streams"),
                tiling=values.pop("tiling_level"),
                timing_cache=values.pop("timing_cache"),
                weight_streaming=values.pop("weight_streaming"),
                tf32=values.pop("tf32"),
                layer_dump=values.pop("layer_dump"),
                weights=values.pop("engine_weights", BOUND),
                carry_onnx=values.pop("carry_onnx", False),
                plugins=tuple(dict.fromkeys(values.pop("plugin", ()))),
            )
            return command(*arguments, engine=engine, **values)

        for option in reversed(_OPTIONS if rebuilding else (*_OPTIONS, *_BUILD_ONLY)):
            called = option(called)
        return called

    return decorate


def compute_capabilities(text: str | None) -> tuple[str, ...]:
    """ "89,12.0" -> ("89", "120")."""
    given = [part.strip().lower().removeprefix("sm").removeprefix("_").replace(".", "") for part in (text or "").split(",")]
    sms = tuple(dict.fromkeys(part for part in given if part))
    wrong = [part for part in sms if not part.isdigit() or len(part) not in (2, 3)]
    if wrong:
        raise click.UsageError(f"--sm {text}: {wrong[0]!r} is not a compute capability like 89 or 120")
    return sms
