"""qwen-export build"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen_export.bundles.signatures import check_key, sign_bundle
from qwen_export.cache_formats import CACHE_PRECISIONS
from qwen_export.commands.calibration_flag import calibration_option
from qwen_export.commands.device_memory_flag import device_memory_option
from qwen_export.commands.engine_flags import engine_options
from qwen_export.commands.hub_flags import hub_options
from qwen_export.commands.output import notice, size, verbosity_options
from qwen_export.commands.param_types import Gigabytes, Numbers
from qwen_export.commands.progress import progress
from qwen_export.commands.stage_text import stage_lines
from qwen_export.downloads.hub_options import HubOptions
from qwen_export.engine_options import EngineOptions
from qwen_export.errors import QwenExportError
from qwen_export.extras import needed_for
from qwen_export.manifest import Manifest, load_manifest
from qwen_export.targets import DECOMPOSABLE, PRECISIONS, TARGETS

if TYPE_CHECKING:
    from qwen_export.building.build_plan import BuildPlan


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
@calibration_option
@click.option("--device", default=None, type=click.Choice(["cpu", "cuda", "dml"]), help="Default: cpu, or the only device of the target.")
@click.option(
    "--max-context", type=click.IntRange(1), metavar="N", help="Capacity of the caches in tokens; default 32768 or the model's limit."
)
@click.option(
    "--rope-scaling",
    metavar="yarn:FACTOR",
    help="Stretch the context that the model can read: yarn:4 for 1010000 tokens. Changes short texts, too.",
)
@click.option(
    "--lora",
    multiple=True,
    metavar="DIR[:SCALE]",
    help="Merge this PEFT adapter into the weights, at SCALE of its strength; may be given several times, in order.",
)
@click.option("--mtp/--no-mtp", default=True, show_default=True, help="With the checkpoint's draft head, for speculative decoding.")
@click.option(
    "--vision/--no-vision",
    default=None,
    help="With the checkpoint's vision tower, to read pictures; by default where it has one and the target can.",
)
@click.option(
    "--cache-precision",
    type=click.Choice(CACHE_PRECISIONS),
    help="What attention caches keep of keys and values; by default as activations. Target onnxruntime with this project's kernels.",
)
@click.option("--draft-vocab", type=click.IntRange(1), metavar="N", help="Draft among the lowest N token ids only; default 65536.")
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
    "--picture-tokens",
    type=Numbers(),
    metavar="N,N",
    help="Sizes of pictures that the tower gets a graph for, in tokens of 32 x 32 pixels; default 64,256,1024; not target onnxruntime.",
)
@click.option(
    "--weights",
    default="copy",
    show_default=True,
    type=click.Choice(["copy", "reference"]),
    help="`reference` leaves in CHECKPOINT what is stored there as the graph needs it.",
)
@click.option(
    "--stages",
    type=click.IntRange(1),
    metavar="N",
    help="Cut the decoder into N graphs, for as many GPUs; by default as many as its memory needs.",
)
@device_memory_option
@click.option(
    "--host-experts", is_flag=True, help="Let routed experts stay in host memory, where the GPU has too little (run --weight-budget)."
)
@click.option("--jobs", type=click.IntRange(1, 1024), metavar="N", help="Threads that make weights; default one per core.")
@click.option("--max-memory", type=Gigabytes(least=0.1), metavar="GB", help="What the build may use, in 10^9 bytes; default about 1.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--sign", type=click.Path(path_type=Path), metavar="KEY", help="Sign the manifest with this private ed25519 key (PEM).")
@hub_options
@engine_options()
@verbosity_options
def command(
    checkpoint: Path,
    output: Path,
    target: str,
    precision: str | None,
    device: str | None,
    max_context: int | None,
    rope_scaling: str | None,
    lora: tuple[str, ...],
    mtp: bool,
    draft_vocab: int | None,
    lookup: bool,
    vision: bool | None,
    cache_precision: str | None,
    plan_file: Path | None,
    calibrate: str | None,
    dump_ir: Path | None,
    opset: int | None,
    chunk: int | None,
    step_tokens: int | None,
    decompose: tuple[str, ...],
    picture_tokens: tuple[int, ...] | None,
    weights: str,
    stages: int | None,
    device_memory: int | None,
    host_experts: bool,
    jobs: int | None,
    max_memory: int | None,
    force: bool,
    sign: Path | None,
    engine: EngineOptions,
    hub_access: HubOptions,
) -> None:
    """Compile CHECKPOINT into a bundle: a directory in Hugging Face's form, a GGUF file, or an id such as Qwen/Qwen3.5-0.8B."""
    started = time.monotonic()
    with needed_for("build"):
        from qwen_export.building.build_plan import default_precision
        from qwen_export.building.compiler import build
        from qwen_export.building.staging import unfinished
        from qwen_export.building.static_plan import StaticOptions
        from qwen_export.downloads.local_checkpoint import local_checkpoint
        from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint

    device = device or TARGETS[target].devices[0]
    options = StaticOptions(chunk, step_tokens, opset, decompose, picture_tokens or StaticOptions.picture_tokens)
    if not TARGETS[target].static and options != StaticOptions():
        raise click.UsageError(
            "--opset, --chunk, --step-tokens, --decompose and --picture-tokens are for targets with graphs of fixed sizes"
        )
    if not TARGETS[target].engines and engine != EngineOptions():
        raise click.UsageError("options of engines, from --sm on, are for the targets tensorrt and tensorrt-rtx")
    if sign is not None:
        check_key(sign)
    named, checkpoint = checkpoint, local_checkpoint(checkpoint, hub_access)
    if precision is None:
        precision = default_precision(open_checkpoint(checkpoint, rope_scaling), target, device)
    left = unfinished(output)
    if left is not None:
        notice(f"going on with the finished weights that an interrupted build has left in {left}")
    cut: list[str] = []
    with progress() as report:

        def planned(plan: BuildPlan) -> None:
            cut.extend(stage_lines([stage.facts for stage in plan.stages]))
            for line in plan.notes:
                notice(line)

        build(
            checkpoint,
            output,
            target=target,
            device=device,
            precision=precision,
            max_context=max_context,
            rope_scaling=rope_scaling,
            lora=lora,
            mtp=mtp,
            draft_vocab=draft_vocab,
            lookup=lookup,
            vision=vision,
            cache_precision=cache_precision,
            plan_file=plan_file,
            calibrate=calibrate,
            dump_ir=dump_ir,
            weights=weights,
            stages=stages,
            device_memory=device_memory,
            host_experts=host_experts,
            jobs=jobs,
            max_memory=max_memory,
            force=force,
            options=options,
            engine=engine,
            planned=planned,
            report=report,
        )
    if sign is not None:
        sign_bundle(output, sign)
    manifest = load_manifest(output)
    notice(f"{output}: {size(sum(entry.size for entry in manifest.files.values()))} in {time.monotonic() - started:.1f} s")
    for line in cut:
        notice(line)
    notice(_next(output, named, manifest))


def _next(output: Path, checkpoint: Path, manifest: Manifest) -> str:
    """What to do next, where this machine can do it."""
    from qwen_export.runtimes.backends.compatibility import check_runnable

    command = f"qwen-export verify {shlex.quote(str(output))} --reference {shlex.quote(str(checkpoint))}"
    try:
        check_runnable(manifest)
    except QwenExportError as error:
        return f"next, on a machine that can run the bundle: {command}\n(here: {error.what})"
    return f"next: {command}"
