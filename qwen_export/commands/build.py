"""qwen-export build"""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from qwen_export.building.build_plan import BuildPlan, default_precision
from qwen_export.building.compiler import build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.commands.engine_flags import engine_options
from qwen_export.commands.output import progress_bar, size
from qwen_export.engine_options import EngineOptions
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.manifest import load_manifest
from qwen_export.plugins.standard.standard_choices import DECOMPOSABLE
from qwen_export.targets import PRECISIONS, TARGETS


@click.command("build")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the new bundle.")
@click.option("--target", default="onnxruntime", show_default=True, type=click.Choice(list(TARGETS)))
@click.option(
    "--precision",
    default=None,
    type=click.Choice(PRECISIONS),
    help="Weights and activations; by default what a 4- or 8-bit checkpoint stores, else fp32 on cpu and fp16 elsewhere. int8, int4, fp8: "
    "quantized weights.",
)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file that overrides which matrices int8 or int4 quantizes, and how.",
)
@click.option("--device", default=None, type=click.Choice(["cpu", "cuda", "dml"]), help="Default: cpu, or the only device of the target.")
@click.option("--max-context", type=int, metavar="N", help="Capacity of the caches in tokens; default 32768 or the model's limit.")
@click.option(
    "--rope-scaling",
    metavar="yarn:FACTOR",
    help="Stretch the context that the model can read: yarn:4 for 1010000 tokens. Changes short texts, too.",
)
@click.option("--mtp/--no-mtp", default=True, show_default=True, help="With the checkpoint's draft head, for speculative decoding.")
@click.option("--draft-vocab", type=int, metavar="N", help="Draft among the lowest N token ids only; default 65536.")
@click.option("--lookup", is_flag=True, help="Without a draft head, too, be ready for drafts from the text (run --speculate lookup).")
@click.option("--dump-ir", type=click.Path(path_type=Path), metavar="DIR", help="Write the graph after each compiler phase.")
@click.option("--opset", type=int, metavar="N", help="Version of the ONNX standard; targets onnx and directml.")
@click.option("--chunk", type=int, metavar="N", help="Tokens per call while reading prompts; not target onnxruntime.")
@click.option(
    "--step-tokens", type=int, metavar="N", help="Tokens that a call verifies; default 4 with speculation; not target onnxruntime."
)
@click.option(
    "--decompose", multiple=True, type=click.Choice(DECOMPOSABLE), help="Build this op from simple ones; targets onnx and directml."
)
@click.option(
    "--weights",
    default="copy",
    show_default=True,
    type=click.Choice(["copy", "reference"]),
    help="`reference` leaves in CHECKPOINT what is stored there as the graph needs it.",
)
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Threads that make weights; default one per core.")
@click.option("--max-memory", type=float, metavar="GB", help="What the build may use, in 10^9 bytes; default about 1.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@engine_options()
def command(
    checkpoint: Path,
    output: Path,
    target: str,
    precision: str | None,
    device: str | None,
    max_context: int | None,
    rope_scaling: str | None,
    mtp: bool,
    draft_vocab: int | None,
    lookup: bool,
    plan_file: Path | None,
    dump_ir: Path | None,
    opset: int | None,
    chunk: int | None,
    step_tokens: int | None,
    decompose: tuple[str, ...],
    weights: str,
    jobs: int | None,
    max_memory: float | None,
    force: bool,
    engine: EngineOptions,
) -> None:
    """Compile CHECKPOINT, a Hugging Face checkpoint directory, into a bundle."""
    started = time.monotonic()
    device = device or TARGETS[target].devices[0]
    options = StaticOptions(chunk, step_tokens, opset, decompose)
    if not TARGETS[target].static and options != StaticOptions():
        raise click.UsageError("--opset, --chunk, --step-tokens and --decompose are for targets with graphs of fixed sizes")
    if not TARGETS[target].engines and engine != EngineOptions():
        raise click.UsageError("options of engines, from --sm on, are for the targets tensorrt and tensorrt-rtx")
    columns = (
        TextColumn("{task.description}", table_column=None),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    if precision is None:
        precision = default_precision(open_checkpoint(checkpoint, rope_scaling), target, device)
    with progress_bar(*columns) as bar:
        task = bar.add_task("", total=None)

        def planned(plan: BuildPlan) -> None:
            for line in plan.notes:
                bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

        def report(name: str, done: int, total: int) -> None:
            bar.update(task, description=f"{name:.52}", completed=done, total=total or None)

        build(
            checkpoint,
            output,
            target=target,
            device=device,
            precision=precision,
            max_context=max_context,
            rope_scaling=rope_scaling,
            mtp=mtp,
            draft_vocab=draft_vocab,
            lookup=lookup,
            plan_file=plan_file,
            dump_ir=dump_ir,
            weights=weights,
            jobs=jobs,
            max_memory=int(max_memory * 1e9) if max_memory is not None else None,
            force=force,
            options=options,
            engine=engine,
            planned=planned,
            report=report,
        )
    total = sum(entry.size for entry in load_manifest(output).files.values())
    click.echo(f"{output}: {size(total)} in {time.monotonic() - started:.1f} s", err=True)
    click.echo(f"next: qwen-export verify {output} --reference {checkpoint}", err=True)
