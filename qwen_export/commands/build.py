"""qwen-export build"""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from qwen_export.commands.output import progress_bar, size
from qwen_export.compiler import build
from qwen_export.manifest import load_manifest
from qwen_export.targets import PRECISIONS, TARGETS


@click.command("build")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the new bundle.")
@click.option("--target", default="onnxruntime", show_default=True, type=click.Choice(list(TARGETS)))
@click.option(
    "--precision",
    default=None,
    type=click.Choice(PRECISIONS),
    help="Weights and activations; fp32 on cpu, fp16 on cuda by default. int8, int4: quantised weights.",
)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file that overrides which matrices int8 or int4 quantises, and how.",
)
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--max-context", type=int, metavar="N", help="Capacity of the caches in tokens; default 32768 or the model's limit.")
@click.option("--mtp/--no-mtp", default=True, show_default=True, help="With the checkpoint's draft head, for speculative decoding.")
@click.option("--draft-vocab", type=int, metavar="N", help="Draft among the lowest N token ids only; default the whole vocabulary.")
@click.option("--lookup", is_flag=True, help="Without a draft head, too, be ready for drafts from the text (run --speculate lookup).")
@click.option("--dump-ir", type=click.Path(path_type=Path), metavar="DIR", help="Write the graph after each compiler phase.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def command(
    checkpoint: Path,
    output: Path,
    target: str,
    precision: str | None,
    device: str,
    max_context: int | None,
    mtp: bool,
    draft_vocab: int | None,
    lookup: bool,
    plan_file: Path | None,
    dump_ir: Path | None,
    force: bool,
) -> None:
    """Compile CHECKPOINT, a Hugging Face checkpoint directory, into a bundle."""
    started = time.monotonic()
    columns = (
        TextColumn("{task.description}", table_column=None),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with progress_bar(*columns) as bar:
        task = bar.add_task("", total=None)

        def report(name: str, done: int, total: int) -> None:
            bar.update(task, description=f"{name:.52}", completed=done, total=total or None)

        build(
            checkpoint,
            output,
            target=target,
            device=device,
            precision=precision or ("fp16" if device == "cuda" else "fp32"),
            max_context=max_context,
            mtp=mtp,
            draft_vocab=draft_vocab,
            lookup=lookup,
            plan_file=plan_file,
            dump_ir=dump_ir,
            force=force,
            report=report,
        )
    total = sum(entry.size for entry in load_manifest(output).files.values())
    click.echo(f"{output}: {size(total)} in {time.monotonic() - started:.1f} s", err=True)
    click.echo(f"next: qwen-export verify {output} --reference {checkpoint}", err=True)
