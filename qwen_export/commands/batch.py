"""qwen-export batch"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qwen_export.commands.hashing import hash_with_progress
from qwen_export.commands.load_options import load_options
from qwen_export.commands.output import notice, verbosity_options
from qwen_export.commands.param_types import Gigabytes
from qwen_export.commands.progress import progress
from qwen_export.errors import ParameterError
from qwen_export.extras import needed_for


@click.command("batch")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("requests", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="ANSWERS.jsonl")
@click.option("--slots", default=8, show_default=True, type=click.IntRange(1), help="Sequences that run at once.")
@click.option("--max-context", type=int, metavar="N", help="Overrides the bundle's cache capacity.")
@click.option("--cache-memory", type=Gigabytes(), metavar="GB", help="Memory for states, caches and shared beginnings.")
@click.option("--prefix-memory", type=Gigabytes(), metavar="GB", help="The part of it for beginnings that prompts share; default 1.")
@click.option("--prefix-on-device", is_flag=True, help="Keep these beginnings in the GPU's memory, where there is one.")
@load_options()
@verbosity_options
def command(
    bundle: Path,
    requests: Path,
    output: Path,
    slots: int,
    max_context: int | None,
    cache_memory: int | None,
    prefix_memory: int | None,
    prefix_on_device: bool,
    loading: dict[str, Any],
) -> None:
    """Answer every line of REQUESTS, a file in OpenAI's batch format, into ANSWERS.jsonl in the same order.

    An interrupted run goes on where it stopped: call it again with the same files."""
    if output.resolve() == requests.resolve():
        raise ParameterError("the answers would overwrite the requests", parameter="output", got=str(output), fix="Give another name.")
    with needed_for("batch"):
        from qwen_export.runtimes.model import load
        from qwen_export.runtimes.serving.batch_run import run_batch
        from qwen_export.runtimes.serving.engine import Engine
    hash_with_progress(bundle)
    model = load(bundle, max_context=max_context, **loading)
    with requests.open("rb") as file:
        total = sum(1 for line in file if line.strip())
    lines = failed = tokens = 0
    # No reader waits for a token: prompts are read as fast as it goes.
    engine = Engine.of(
        model, slots, cache_memory=cache_memory, prefix_memory=prefix_memory, prefix_on_device=prefix_on_device, stall=float("inf")
    )
    with progress("requests") as report, engine:

        def done(line: dict[str, Any]) -> None:
            nonlocal lines, failed, tokens
            lines += 1
            if line:
                response = line["response"]
                failed += response["status_code"] != 200
                tokens += response["body"].get("usage", {}).get("completion_tokens", 0)
            report("answering", lines, total)

        run_batch(model, engine, requests, output, slots, done)
    notice(f"{lines} requests, {failed} without an answer, {tokens} new tokens")
