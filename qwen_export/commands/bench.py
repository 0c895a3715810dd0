"""qwen-export bench"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from qwen_export.commands.run import hash_with_progress
from qwen_export.commands.speculate import speculate_option
from qwen_export.commands.weight_budget import weight_budget_option
from qwen_export.errors import QwenExportError
from qwen_export.runtimes.benchmark import benchmark
from qwen_export.runtimes.model import Speculate


class _Numbers(click.ParamType):
    """Comma-separated positive integers."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < 1:
            self.fail(f"{value!r} is not a list of positive integers such as 128,512", param, ctx)
        return numbers


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt-tokens", default="128,512,2048", show_default=True, type=_Numbers())
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--threads", type=int, metavar="N", help="CPU threads; default one per core.")
@click.option("--repack", is_flag=True, help="CPU: copy the weights into the kernels' order: slower load, faster steps.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw prefill speed by prompt length, and drafts kept by position."
)
@click.option(
    "--text", type=click.Path(path_type=Path), metavar="FILE", help="Speculate on this text's continuation; default random tokens."
)
@weight_budget_option
@speculate_option
def command(
    bundle: Path,
    prompt_tokens: tuple[int, ...],
    new_tokens: int,
    threads: int | None,
    repack: bool,
    as_json: bool,
    plot: Path | None,
    text: Path | None,
    weight_budget: int | None,
    speculate: Speculate,
) -> None:
    """Measure BUNDLE on this machine: load, prefill, decode, speculation, memory."""
    hash_with_progress(bundle)
    console = Console(stderr=True)
    with console.status("loading") as status:
        result = benchmark(
            bundle,
            prompt_tokens,
            new_tokens,
            threads,
            report=lambda line: status.update(line),
            repack=repack,
            speculate=speculate,
            weight_budget=weight_budget,
            text=text.read_text(encoding="utf-8") if text is not None else None,
        )
    click.echo(json.dumps(result, indent=1) if as_json else _text(result))
    if plot is not None:
        _draw(result, plot)


def _text(result: dict[str, Any]) -> str:
    lines = [f"load      {result['load_s']:.2f} s"]
    lines += [f"prefill   {row['tokens']:6} tokens  {row['tok_per_s']:9.1f} tok/s" for row in result["prefill"]]
    lines.append(f"decode    {result['decode_tok_per_s']:.2f} tok/s")
    drafts = result["speculation"]
    if drafts:
        kept = " ".join(f"{share:.0%}" for share in drafts["acceptance"])
        lines.append(
            f"drafted   {drafts['tok_per_s']:.2f} tok/s against {drafts['plain_tok_per_s']:.2f} without: "
            f"{drafts['tokens_per_round']:.2f} tokens a round, kept {kept or '-'}"
        )
        lines.append(f"          draft {drafts['draft_s']:.3f} s, verify {drafts['verify_s']:.3f} s, host {drafts['host_s']:.3f} s")
    lines.append(f"peak RSS  {result['peak_rss_mb']:.0f} MB")
    return "\n".join(lines)


def _draw(result: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise QwenExportError("plots need matplotlib", fix="pip install 'qwen-export[plot]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept = (result["speculation"] or {}).get("acceptance")
    figure, grid = pyplot.subplots(1, 2 if kept else 1, figsize=(10 if kept else 6, 3.5), squeeze=False)
    axes, *more = grid[0]
    if kept:
        more[0].bar(range(1, len(kept) + 1), [100 * share for share in kept])
        more[0].set(xlabel="position of the draft", ylabel="kept, %", ylim=(0, 100), title="drafts kept, of those made")
    tokens = [row["tokens"] for row in result["prefill"]]
    axes.plot(tokens, [row["tok_per_s"] for row in result["prefill"]], marker="o", label="prefill")
    axes.axhline(result["decode_tok_per_s"], linestyle="--", color="tab:orange", label=f"decode {result['decode_tok_per_s']:.1f} tok/s")
    axes.set(xlabel="prompt tokens", ylabel="tokens per second", ylim=(0, None), title=f"{result['device']} {result['precision']}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(n) for n in tokens])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
