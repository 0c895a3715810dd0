"""The comparison of layers for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_VERDICTS = {True: "ok", False: "FAIL", None: "-"}
_KINDS = {"linear_attention": "linear", "full_attention": "full"}
_WIDTH = 120


def print_layers(result: dict[str, Any]) -> None:
    """The result of `verify_layers` as a table, a line per layer, and its warnings."""
    console = Console(width=None if Console().is_terminal else _WIDTH, soft_wrap=False, highlight=False)
    title = f"{result['precision']}, each layer from the same input; errors as a share of the output, limit {result['tolerance']:.1e}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("layer")
    table.add_column("attention")
    for name in ("max |error|", "error", "adds up to", "largest |value|"):
        table.add_column(name, justify="right")
    table.add_column("in")
    table.add_column("of fp16", justify="right")
    table.add_column("")
    for row in result["layers"]:
        found = f", from {row['origin']} on" if row["origin"] else ""
        table.add_row(
            row["name"],
            _KINDS.get(row["kind"], row["kind"]),
            _number(row["max_abs_error"]),
            _number(row["error"]),
            _number(row["drift"]),
            "" if row["reach"] is None else f"{row['reach']:.4g}",
            row["at"],
            "" if row["fp16_share"] is None else f"{row['fp16_share']:.2%}",
            f"{_VERDICTS[row['passed']]}{found}" + (f"  ({row['note']})" if row["note"] else ""),
            style="bold red" if row["passed"] is False else None,
        )
    console.print(table)
    for warning in result["warnings"]:
        console.print(f"warning: {warning}.", style="yellow")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
