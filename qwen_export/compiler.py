"""The build: checkpoint in, verified bundle out. This file is the list of its stages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_export import __version__
from qwen_export.graphs.checkpoint.directory import Checkpoint, open_checkpoint
from qwen_export.graphs.checkpoint.names import stored_dtypes
from qwen_export.graphs.rotary import rotary_frequencies
from qwen_export.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    FileEntry,
    GraphSpec,
    Manifest,
    RotarySpec,
    StateSpec,
    TargetSpec,
    TensorSpec,
    hash_file,
)
from qwen_export.plan import BuildPlan, plan_build
from qwen_export.plugins.native.library import NATIVE
from qwen_export.runtimes.compatibility import this_platform
from qwen_export.staging import staged_directory
from qwen_export.text_assets import check_text_assets, copy_text_assets, stop_ids

if TYPE_CHECKING:
    import onnx_ir as ir

GRAPH, WEIGHTS = "decoder.onnx", "decoder.weights"

Report = Callable[[str, int, int], None]
"""Progress: stage or tensor name, bytes of weights done, bytes of weights in all (0 before they are known)."""


def build(
    checkpoint: str | Path,
    output: str | Path,
    *,
    target: str = "onnxruntime",
    device: str = "cpu",
    precision: str = "fp32",
    max_context: int | None = None,
    plan_file: str | Path | None = None,
    dump_ir: str | Path | None = None,
    force: bool = False,
    report: Report | None = None,
) -> Path:
    """Compile the checkpoint directory into a bundle at `output` and return its path.

    `precision` is the dtype of weights and activations (recurrent states stay fp32); "int8" and "int4" quantise weights as their plan says,
    which the TOML file `plan_file` overrides (graphs.quantization.plan). `max_context` is the capacity of the caches in tokens, `dump_ir` a directory for one text file per compiler phase. Raises QwenExportError; on any failure no bundle is left behind."""
    say = report or (lambda name, done, total: None)
    say("reading headers", 0, 0)
    source = open_checkpoint(checkpoint)
    plan = plan_build(source, target, device, precision, max_context, Path(plan_file) if plan_file else None)
    check_text_assets(source.path)
    with staged_directory(Path(output), replace=force) as staging:
        say("capturing the graph", 0, 0)
        model = lower(source, plan, Path(dump_ir) if dump_ir else None)
        files = _emit(source, plan, model, staging, say)
        _manifest(source, plan, model, files, staging)
    return Path(output)


def lower(source: Checkpoint, plan: BuildPlan, dump: Path | None = None) -> ir.Model:
    """Capture the decoder and run the target's passes. Reads no weight."""
    from qwen_export.graphs.capture import capture_decoder
    from qwen_export.graphs.checkpoint.names import StoredLayout
    from qwen_export.graphs.passes.context import PassContext
    from qwen_export.graphs.pipeline import run_passes
    from qwen_export.graphs.weights.layout import resolve_layout

    model = capture_decoder(source.config.text, plan.activations)
    resolve_layout(model, source.config.text, StoredLayout.of(source))
    context = PassContext(source.config.text, plan.activations, plan.choices, stored_dtypes(source), plan.quantization)
    run_passes(model, plan.target, context, dump)
    return model


def _emit(source: Checkpoint, plan: BuildPlan, model: ir.Model, staging: Path, say: Report) -> dict[str, FileEntry]:
    """Write weights, graph, plugins and text assets; returns the files of the bundle."""
    import onnx_ir as ir

    from qwen_export.graphs.checkpoint.reader import CheckpointReader
    from qwen_export.graphs.weights.writer import weight_bytes, write_weights

    total, done = weight_bytes(model), 0

    def progress(name: str, count: int) -> None:
        nonlocal done
        done += count
        say(name, done, total)

    with CheckpointReader(source) as reader:
        files = {WEIGHTS: write_weights(model, reader, staging / WEIGHTS, progress)}
    model.producer_name, model.producer_version = "qwen-export", __version__
    for node in model.graph:
        model.opset_imports.setdefault(node.domain, 1)
    ir.save(model, staging / GRAPH)
    for library in plan.plugins:
        shutil.copyfile(library, staging / library.name)
    for name in (GRAPH, *(library.name for library in plan.plugins), *copy_text_assets(source.path, staging)):
        files[name] = hash_file(staging / name)
    return files


def _manifest(source: Checkpoint, plan: BuildPlan, model: ir.Model, files: dict[str, FileEntry], staging: Path) -> None:
    text = source.config.text
    inv_freq, scaling = rotary_frequencies(text)
    # Operators of the plugins come with the bundle.
    operators = sorted({f"{node.domain}.{node.op_type}" for node in model.graph if node.domain and node.domain != NATIVE})
    manifest = Manifest(
        schema=SCHEMA_VERSION,
        producer=f"qwen-export {__version__}",
        model=text.to_json(),
        target=TargetSpec(
            plan.target.name,
            plan.device,
            plan.precision,
            plan.target.backend,
            plan.target.minimum_backend,
            tuple(operators),
            this_platform() if plan.plugins else "",
        ),
        max_context=plan.max_context,
        rotary=RotarySpec(tuple(inv_freq), scaling),
        graphs={"decoder": _graph_spec(model)},
        files=files,
        plugins=tuple(library.name for library in plan.plugins),
        stop_ids=stop_ids(source.path, text.eos_token_ids),
        precision_plan={
            "weights": _weight_types(model, plan.activations),
            "activations": plan.activations,
            "recurrent state": "fp32",
            "attention cache": plan.activations,
        }
        | (plan.quantization.to_json() if plan.quantization else {}),
        source={"architecture": source.config.architecture, "lowerings": {op: choice.name for op, choice in plan.choices.items()}},
    )
    (staging / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _weight_types(model: ir.Model, precision: str) -> str:
    kept = precision == "fp32" and any(
        value.dtype is not None and value.dtype.name == "BFLOAT16" for value in model.graph.initializers.values()
    )
    return "fp32; projections, embedding and head bf16, as stored" if kept else precision


def _graph_spec(model: ir.Model) -> GraphSpec:
    def spec(value: ir.Value) -> TensorSpec:
        if value.shape is None or value.dtype is None or value.name is None:
            raise AssertionError("the verifier lets no untyped signature through")
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
        return TensorSpec(value.name, value.dtype.name.lower(), shape)

    inputs = tuple(spec(v) for v in model.graph.inputs)
    outputs = tuple(spec(v) for v in model.graph.outputs)
    names = {t.name for t in outputs}
    states = tuple(StateSpec(t.name, f"{t.name}.next", t.dtype, t.shape, grows="S" in t.shape) for t in inputs if f"{t.name}.next" in names)
    return GraphSpec(GRAPH, inputs, outputs, states)
