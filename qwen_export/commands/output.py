"""How the commands print numbers."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A bar on stderr that leaves nothing behind, and nothing at all where stderr is not a terminal."""
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def size(count: int) -> str:
    """Bytes for people: `1.6 GiB`, `23 MiB`."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):.2f} GiB"
    return f"{count / (1 << 20):.1f} MiB"


def mixers(model: dict[str, Any]) -> str:
    """The layers of a report's model: `24 layers (18 DeltaNet, 6 attention)`."""
    layers, attention = model["layers"], model["attention_layers"]
    return f"{layers} layers ({layers - attention} DeltaNet, {attention} attention)"


def count(number: int) -> str:
    """A number of parameters: `752 M`, `26.9 B`."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
