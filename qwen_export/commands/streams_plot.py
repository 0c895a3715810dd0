"""The plot of `bench --streams`: speed by number of streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_export.commands.speed_plot import check_plot as check_plot


def draw_streams(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5))
    counts = [row["streams"] for row in rows]
    left.plot(counts, [row["engine_tok_per_s"] for row in rows], marker="o", label="engine")
    left.plot(counts, [row["bare_tok_per_s"] for row in rows], marker="x", linestyle="--", label="bare decoder loop")
    left.set(xlabel="streams", ylabel="tokens per second, all streams", ylim=(0, None))
    right.plot(counts, [1000 * row["first_token_s"] for row in rows], marker="o", label="median")
    right.plot(counts, [1000 * row["last_first_token_s"] for row in rows], marker="x", linestyle="--", label="last")
    right.set(xlabel="streams that arrive at once", ylabel="time to the first token, ms", ylim=(0, None))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
