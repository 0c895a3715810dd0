"""The build: checkpoint in, verified bundle out. This file is the list of its stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from qwen_export.building.build_plan import BuildPlan, plan_build
from qwen_export.building.calibration.calibration_text import read_text
from qwen_export.building.engines import for_this_machine, ready_library
from qwen_export.building.stage_plan import present_memory
from qwen_export.building.staging import signals_held, staged_directory
from qwen_export.building.static_plan import StaticOptions
from qwen_export.building.text_assets import check_text_assets, copy_text_assets
from qwen_export.downloads.local_checkpoint import local_checkpoint
from qwen_export.engine_options import EngineOptions
from qwen_export.errors import ParameterError, UnsupportedError
from qwen_export.graphs.checkpoint.adapters.merge_adapters import AdapterSource, adapter_source
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.manifest import WEIGHTS, hash_file
from qwen_export.plugins.native.native_search import find_search
from qwen_export.runtimes.text_check import check_text
from qwen_export.stages import stage_weights
from qwen_export.targets import TARGETS

if TYPE_CHECKING:
    from qwen_export.building.emission import Report

_MOST_JOBS = 1024


def build(
    checkpoint: str | Path,
    output: str | Path,
    *,
    target: str = "onnxruntime",
    device: str = "cpu",
    precision: str = "fp32",
    max_context: int | None = None,
    rope_scaling: str | None = None,
    lora: Sequence[str | Path | AdapterSource] = (),
    mtp: bool = True,
    draft_vocab: int | None = None,
    lookup: bool = False,
    vision: bool | None = None,
    cache_precision: str | None = None,
    plan_file: str | Path | None = None,
    calibrate: str | Path | None = None,
    dump_ir: str | Path | None = None,
    force: bool = False,
    weights: str = "copy",
    jobs: int | None = None,
    max_memory: int | None = None,
    options: StaticOptions | None = None,
    engine: EngineOptions | None = None,
    stages: int | None = None,
    device_memory: int | None = None,
    host_experts: bool = False,
    planned: Callable[[BuildPlan], None] | None = None,
    report: Report | None = None,
) -> Path:
    """Compile a checkpoint into a bundle at `output` and return its path. `checkpoint`: a directory, a GGUF file, or an id of the hub.

    `precision` is the dtype of weights and activations (recurrent states stay fp32); "int8" and "int4" quantize weights as their plan says,
    which the TOML file `plan_file` overrides (graphs.quantization.precision_plan). `calibrate`: a text file, or "built-in", that the model
    reads to choose the codes of 4 bits. `max_context` is the capacity of the caches in tokens.
    `lora`: adapters that are merged into the weights in this order, as the directory that PEFT wrote, or DIR:SCALE.
    `rope_scaling` stretches the context that the model can read, for short texts, too: "yarn:4" instead of what config.json says.
    `mtp`: with the checkpoint's draft head, for speculative decoding; `draft_vocab` cuts its vocabulary to the lowest ids. `lookup`:
    without a head, too, the graph can verify drafts that come from the text. `vision`: with the checkpoint's vision tower, to read
    pictures; None where the checkpoint has one and the target can. `cache_precision`: what attention caches keep of keys and values,
    "fp16", "fp8" or "int8"; None for the precision of the activations. `dump_ir` is a directory for one text file per compiler phase.

    With `weights` "reference", what the checkpoint stores as the graphs need it stays there, and the bundle runs only beside the
    checkpoint; `packaging.package` completes it. `jobs` threads make weights, by default one per core; `max_memory` is what the process
    may use meanwhile, in bytes. `options` are those of targets with static shapes, `engine` those of targets with engines. `stages`: into
    how many consecutive graphs the decoder is cut, each for a device of its own; None for as many as weights, a full context and working
    memory need on GPUs of `device_memory` bytes, by default those of the smallest GPU of this machine; one where it has none.
    `host_experts`: routed experts, quantized, may stay in host memory, from which the GPU reads them (`load`, weight_budget). `planned` is
    called with the plan before the work begins, `report` while it goes on.

    Raises QwenExportError; on any failure no bundle is left behind. After an interrupt the next build to `output` goes on with the
    weights that are finished."""
    _check_arguments(weights, jobs, max_memory)
    say = report or (lambda name, done, total: None)
    say("reading headers", 0, 0)
    source = open_checkpoint(local_checkpoint(checkpoint), rope_scaling, [adapter_source(text) for text in lora])
    if target in TARGETS and TARGETS[target].engines:
        engine = for_this_machine(engine or EngineOptions())
    plan = plan_build(
        source,
        target,
        device,
        precision,
        max_context,
        mtp=mtp,
        draft_vocab=draft_vocab,
        lookup=lookup,
        vision=vision,
        cache_precision=cache_precision,
        plan_file=Path(plan_file) if plan_file else None,
        calibrate=calibrate,
        options=options,
        engine=engine,
        stages=stages,
        device_memory=device_memory or (present_memory() if device == "cuda" and stages is None else None),
        host_experts=host_experts,
    )
    search = find_search()
    if plan.quantization is not None and search is not None:
        plan = replace(plan, quantization=replace(plan.quantization, search=search))
    check_text_assets(source.text_directory)
    with TemporaryDirectory(prefix="qwen-export-text-") as folder:  # as the bundle will have them
        check_text(Path(folder), copy_text_assets(source.text_directory, Path(folder)))
    text = None if calibrate is None else read_text(calibrate, source.text_directory)
    if plan.engine is not None:
        if weights == "reference":
            raise UnsupportedError(
                "bundles with engines have their own weights",
                got="reference",
                fix="Leave out {weights}, or build for another {target}.",
            )
        library = ready_library(plan.target.backend, plan.engine)
        if plan.engine.plugins:
            from qwen_export.plugins.tensorrt.probe_plugins import ensure_taken

            ensure_taken(library)
    if planned is not None:
        planned(plan)
    with signals_held():  # what is behind these takes seconds to load
        from qwen_export.building.calibration.calibrate_model import calibrated
        from qwen_export.building.emission import write_files, write_manifest
        from qwen_export.building.lower_graphs import lower
        from qwen_export.graphs.weights.referred_weights import refer_to_checkpoint
    weight_names = (WEIGHTS, *(stage_weights(number) for number in range(len(plan.stages))))
    with staged_directory(Path(output), replace=force, keep=weight_names) as staging:
        say("capturing the graph", 0, 0)
        models = lower(source, plan, Path(dump_ir) if dump_ir else None)
        references = refer_to_checkpoint(list(models.values()), source, staging) if weights == "reference" else {}
        with calibrated(source, plan, text, models, staging, say) as (plan, extra):
            files = write_files(source, plan, models, staging, say, jobs, max_memory)
        files |= {name: hash_file(staging / name) for name in (*references, *extra)}
        write_manifest(source, plan, models, files, references, staging, text)
    return Path(output)


def _check_arguments(weights: str, jobs: int | None, max_memory: int | None) -> None:
    if weights not in ("copy", "reference"):
        raise ParameterError(
            "the treatment of weights is not known",
            parameter="weights",
            got=repr(weights),
            expected="'copy' or 'reference'",
            fix="Choose one of these for {weights}.",
        )
    if jobs is not None and not (type(jobs) is int and 1 <= jobs <= _MOST_JOBS):
        raise ParameterError(
            "the number of threads is out of range", parameter="jobs", got=jobs, expected=f"1 to {_MOST_JOBS}", fix="Change {jobs}."
        )
    if max_memory is not None and not (type(max_memory) is int and max_memory > 0):
        raise ParameterError(
            "the memory is not a number of bytes",
            parameter="max_memory",
            got=max_memory,
            expected="a positive integer",
            fix="Change {max_memory}, or leave it out.",
        )
