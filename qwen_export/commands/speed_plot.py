"""The picture of `bench --plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_export.errors import ParameterError
from qwen_export.extras import needed_for

_LABEL_WIDTH = 0.08
"""Smallest distance of two tick labels, as a share of the axis."""


def check_plot(path: Path) -> None:
    """Raise ParameterError for a file that could not be drawn: a format that matplotlib does not have, or no such folder."""
    with needed_for("bench --plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

    formats = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in formats:
        raise ParameterError(
            "the plot has a format that cannot be drawn",
            parameter="plot",
            got=path.name,
            expected="a name that ends in ." + ", .".join(formats),
            fix="Give a name that ends in .png.",
        )
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ParameterError(
            "the plot cannot be written there", parameter="plot", where=str(path), fix="Give a file in a folder that exists."
        )


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the figures of a benchmark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept = (result["speculation"] or {}).get("acceptance")
    figure, grid = pyplot.subplots(1, 2 if kept else 1, figsize=(10 if kept else 6, 3.5), squeeze=False, layout="constrained")
    axes, *more = grid[0]
    if kept:
        more[0].bar(range(1, len(kept) + 1), [100 * share for share in kept])
        more[0].set(xlabel="position of the draft", ylabel="kept, %", ylim=(0, 100), title="drafts kept, of those made")
        more[0].xaxis.get_major_locator().set_params(integer=True)
    tokens = [row["tokens"] for row in result["prefill"]]
    axes.plot(tokens, [row["tok_per_s"] for row in result["prefill"]], marker="o", label="prefill")
    axes.axhline(result["decode_tok_per_s"], linestyle="--", color="tab:orange", label=f"decode {result['decode_tok_per_s']:.1f} tok/s")
    axes.set(xlabel="prompt tokens", ylabel="tokens per second", ylim=(0, None), title=f"{result['device']} {result['precision']}")
    axes.set_xscale("log", base=2)
    labels = readable_labels(tokens)
    axes.set_xticks(tokens, [str(n) if n in labels else "" for n in tokens])
    axes.legend(loc="best")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def readable_labels(tokens: Sequence[int]) -> list[int]:
    """Those of the prompt lengths, in rising order, whose labels on a logarithmic axis do not overlap. The last one is among them."""
    from math import log2

    span = log2(tokens[-1] / tokens[0]) or 1.0
    shown: list[int] = []
    for n in reversed(tokens):
        if not shown or log2(shown[-1] / n) / span >= _LABEL_WIDTH:
            shown.append(n)
    return shown[::-1]
