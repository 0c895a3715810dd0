"""The build: checkpoint in, verified bundle out. This file is the list of its stages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_export import __version__
from qwen_export.graphs.checkpoint.directory import Checkpoint, open_checkpoint
from qwen_export.graphs.checkpoint.formats.table import storage_summary
from qwen_export.graphs.rotary import rotary_frequencies
from qwen_export.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    FileEntry,
    GraphSpec,
    Manifest,
    Reference,
    RotarySpec,
    StateSpec,
    TargetSpec,
    TensorSpec,
    WeightSpec,
    hash_file,
)
from qwen_export.plan import BuildPlan, plan_build
from qwen_export.plugins.native.library import NATIVE
from qwen_export.staging import JOURNAL, staged_directory
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
    dump_ir: str | Path | None = None,
    force: bool = False,
    weights: str = "copy",
    jobs: int | None = None,
    max_memory: int | None = None,
    report: Report | None = None,
) -> Path:
    """Compile the checkpoint directory into a bundle at `output` and return its path.

    `precision` is the dtype of weights and activations (recurrent states stay fp32), `max_context` the capacity of the caches in tokens,
    `dump_ir` a directory for one text file per compiler phase. With `weights` "reference", what the checkpoint stores as the graph needs
    it stays there, and the bundle runs only beside the checkpoint; `packaging.package` completes it. `jobs` threads make weights, by
    default one per core; `max_memory` is what the process may use meanwhile, in bytes.

    Raises QwenExportError; on any failure no bundle is left behind. After an interrupt the next build to `output` goes on with the
    weights that are finished."""
    say = report or (lambda name, done, total: None)
    say("reading headers", 0, 0)
    source = open_checkpoint(checkpoint)
    plan = plan_build(source, target, device, precision, max_context)
    check_text_assets(source.path)
    with staged_directory(Path(output), replace=force, keep=(WEIGHTS,)) as staging:
        say("capturing the graph", 0, 0)
        model = lower(source, plan, Path(dump_ir) if dump_ir else None)
        references = _refer(source, model, staging) if weights == "reference" else {}
        files = _emit(source, plan, model, staging, say, jobs, max_memory)
        files |= {name: hash_file(staging / name) for name in references}
        _manifest(source, plan, model, files, references, staging)
    return Path(output)


def lower(source: Checkpoint, plan: BuildPlan, dump: Path | None = None) -> ir.Model:
    """Capture the decoder and run the target's passes. Reads no weight."""
    from qwen_export.graphs.capture import capture_decoder
    from qwen_export.graphs.passes.context import PassContext
    from qwen_export.graphs.pipeline import run_passes

    model = capture_decoder(source.config.text, plan.precision)
    run_passes(model, plan.target, PassContext(source.config.text, plan.precision, plan.choices), dump)
    return model


def _refer(source: Checkpoint, model: ir.Model, staging: Path) -> dict[str, Reference]:
    from qwen_export.graphs.weights.reference import refer_to_checkpoint

    return refer_to_checkpoint(model, source, staging)


def _emit(
    source: Checkpoint, plan: BuildPlan, model: ir.Model, staging: Path, say: Report, jobs: int | None, max_memory: int | None
) -> dict[str, FileEntry]:
    """Write weights, graph, plugins and text assets; returns the files of the bundle."""
    import onnx_ir as ir

    from qwen_export.graphs.checkpoint.reader import CheckpointReader
    from qwen_export.graphs.weights.journal import Journal
    from qwen_export.graphs.weights.memory import block_budget
    from qwen_export.graphs.weights.writer import Resume, weight_bytes, write_weights

    total, done = weight_bytes(model), 0

    def progress(name: str, count: int) -> None:
        nonlocal done
        done += count
        say(name, done, total)

    with CheckpointReader(source) as reader:
        resume, budget = Resume(Journal(staging.parent / JOURNAL), reader.identity), block_budget(model, max_memory)
        files = {WEIGHTS: write_weights(model, reader, staging / WEIGHTS, progress, jobs=jobs, budget=budget, resume=resume)}
    model.producer_name, model.producer_version = "qwen-export", __version__
    for node in model.graph:
        model.opset_imports.setdefault(node.domain, 1)
    ir.save(model, staging / GRAPH)
    for library in plan.plugins:
        shutil.copyfile(library, staging / library.name)
    for name in (GRAPH, *(library.name for library in plan.plugins), *copy_text_assets(source.path, staging)):
        files[name] = hash_file(staging / name)
    return files


def _manifest(
    source: Checkpoint, plan: BuildPlan, model: ir.Model, files: dict[str, FileEntry], references: dict[str, Reference], staging: Path
) -> None:
    text = source.config.text
    inv_freq, scaling = rotary_frequencies(text)
    # Operators of the plugins come with the bundle.
    operators = sorted({f"{node.domain}.{node.op_type}" for node in model.graph if node.domain and node.domain != NATIVE})
    manifest = Manifest(
        schema=SCHEMA_VERSION,
        producer=f"qwen-export {__version__}",
        model=text.to_json(),
        target=TargetSpec(
            plan.target.name, plan.device, plan.precision, plan.target.backend, plan.target.minimum_backend, tuple(operators)
        ),
        max_context=plan.max_context,
        rotary=RotarySpec(tuple(inv_freq), scaling),
        graphs={"decoder": _graph_spec(model)},
        files=files,
        references=references,
        plugins=tuple(library.name for library in plan.plugins),
        stop_ids=stop_ids(source.path, text.eos_token_ids),
        precision_plan=_quantized_forms(source)
        | {
            "weights": plan.precision,
            "activations": plan.precision,
            "recurrent state": "fp32",
            "attention cache": plan.precision,
        },
        source={"architecture": source.config.architecture, "lowerings": {op: choice.name for op, choice in plan.choices.items()}},
    )
    (staging / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _quantized_forms(source: Checkpoint) -> dict[str, str]:
    """What became of each quantized form that the decoder's weights were stored in."""
    prefix = source.config.text_prefix
    weights = {name: weight for name, weight in source.weights.items() if name.startswith((prefix, "lm_head."))}
    forms = storage_summary(weights)
    return {f"stored as {form}": f"{count} weights, dequantized" for form, count in forms.items() if form not in ("bf16", "fp16", "fp32")}


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
    return GraphSpec(GRAPH, inputs, outputs, states, tuple(_weight_specs(model)))


def _weight_specs(model: ir.Model) -> Iterator[WeightSpec]:
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            location = str(tensor.location)
            yield WeightSpec(value.name or "", location, tensor.dtype.name.lower(), tuple(tensor.shape.numpy()), tensor.offset or 0)
