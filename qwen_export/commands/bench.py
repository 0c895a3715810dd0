"""qwen-export bench"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qwen_export.commands.hashing import hash_with_progress
from qwen_export.commands.load_options import load_options
from qwen_export.commands.output import verbosity_options
from qwen_export.commands.param_types import Gigabytes, Numbers
from qwen_export.commands.progress import progress
from qwen_export.commands.prompt_source import read_text
from qwen_export.extras import needed_for


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt-tokens", default="128,512,2048", show_default=True, type=Numbers())
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw prefill speed by prompt length, and drafts kept by position."
)
@click.option(
    "--text", type=click.Path(path_type=Path), metavar="FILE", help="Speculate on this text's continuation; default random tokens."
)
@click.option("--streams", type=Numbers(), help="Measure an engine with so many streams instead, beside the bare decoder loop.")
@click.option("--cache-memory", type=Gigabytes(), metavar="GB", help="With --streams: memory for states and caches of the engine.")
@load_options()
@verbosity_options
def command(
    bundle: Path,
    prompt_tokens: tuple[int, ...],
    new_tokens: int,
    as_json: bool,
    plot: Path | None,
    text: Path | None,
    streams: tuple[int, ...] | None,
    cache_memory: int | None,
    loading: dict[str, Any],
) -> None:
    """Measure BUNDLE on this machine: load, prefill, decode, speculation, memory."""
    if streams is not None:
        _bench_streams(bundle, streams, min(prompt_tokens), new_tokens, as_json, plot, cache_memory, loading)
        return
    with needed_for("bench"):
        from qwen_export.runtimes.benchmark import benchmark
    if plot is not None:  # refused before minutes of measuring
        from qwen_export.commands.speed_plot import check_plot, draw

        check_plot(plot)
    continued = read_text(text, "text") if text is not None else None
    hash_with_progress(bundle)
    with progress("steps") as report:
        result = benchmark(bundle, prompt_tokens, new_tokens, report=lambda line: report(line, 0, 0), text=continued, **loading)
    click.echo(json.dumps(result, indent=1) if as_json else _text(result))
    if plot is not None:
        draw(result, plot)


def _bench_streams(
    bundle: Path,
    streams: tuple[int, ...],
    prompt_tokens: int,
    new_tokens: int,
    as_json: bool,
    plot: Path | None,
    cache_memory: int | None,
    loading: dict[str, Any],
) -> None:
    with needed_for("bench"):
        from qwen_export.runtimes.model import load
        from qwen_export.runtimes.serving.streams_benchmark import measure_streams
    if plot is not None:
        from qwen_export.commands.streams_plot import check_plot, draw_streams

        check_plot(plot)
    hash_with_progress(bundle)
    model = load(bundle, max_context=prompt_tokens + 8 * new_tokens, **loading)
    with progress("streams") as report:
        rows = measure_streams(model, streams, prompt_tokens, new_tokens, 3, lambda line: report(line, 0, 0), cache_memory=cache_memory)
    click.echo(json.dumps(rows, indent=1) if as_json else streams_text(rows))
    if plot is not None:
        draw_streams(rows, plot)


def streams_text(rows: list[dict[str, Any]]) -> str:
    """The table of `measure_streams`."""
    lines = ["streams  engine tok/s  bare tok/s  ratio  first token  last first token  host per step  memory"]
    lines += [
        f"{row['streams']:7}  {row['engine_tok_per_s']:12.1f}  {row['bare_tok_per_s']:10.1f}  {row['ratio']:5.2f}"
        f"  {1000 * row['first_token_s']:8.1f} ms  {1000 * row['last_first_token_s']:13.1f} ms  {1000 * row['host_s_per_step']:10.2f} ms"
        f"  {row['cache_bytes'] / 1e9:.2f} GB"
        for row in rows
    ]
    return "\n".join(lines)


def _text(result: dict[str, Any]) -> str:
    lines = [f"load      {result['load_s']:.2f} s"]
    lines += [
        f"prefill   {row['tokens']:6} tokens  {row['tok_per_s']:9.1f} tok/s  first read {1000 * row['first_s']:7.1f} ms"
        for row in result["prefill"]
    ]
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
