"""How the commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

from typing import Any

import click

_QUIET, _NORMAL, _VERBOSE = range(3)


def _set_level(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        context.meta["qwen_export.level"] = _QUIET if option.name == "quiet" else _VERBOSE


def verbosity_options(command: Any) -> Any:
    """The options --quiet and --verbose, which `notice`, `detail` and the progress of the command follow."""
    quiet = click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_set_level, help="Print the result and errors only.")
    verbose = click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_set_level, help="Print more on stderr.")
    return quiet(verbose(command))


def _level() -> int:
    context = click.get_current_context(silent=True)
    return context.meta.get("qwen_export.level", _NORMAL) if context is not None else _NORMAL


def is_quiet() -> bool:
    return _level() == _QUIET


def notice(text: str) -> None:
    """A line on stderr, not with --quiet."""
    if _level() >= _NORMAL:
        click.echo(text, err=True)


def detail(text: str) -> None:
    """A line on stderr with --verbose."""
    if _level() >= _VERBOSE:
        click.echo(text, err=True)


def size(count: int) -> str:
    """Bytes for people: `1.60 GiB`, `23.0 MiB`."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):.2f} GiB"
    return f"{count / (1 << 20):.1f} MiB"


def mixers(model: dict[str, Any]) -> str:
    """The layers of a report's model: `24 layers (18 DeltaNet, 6 attention)`."""
    layers, attention = model["layers"], model["attention_layers"]
    return f"{layers} layers ({layers - attention} DeltaNet, {attention} attention)"


def count(number: int) -> str:
    """A number of parameters: `752.4 M`, `26.90 B`."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
