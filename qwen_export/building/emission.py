"""Writing a bundle's files: weights, graphs, libraries, text assets and the manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import onnx_ir as ir

from qwen_export.building.build_plan import BuildPlan
from qwen_export.building.calibration.calibration_text import CalibrationText
from qwen_export.building.engines import compile_graph, engine_file, engine_spec, mapped, onnx_file
from qwen_export.building.host_experts import expert_weights, with_inputs
from qwen_export.building.staging import journal_path
from qwen_export.building.text_assets import copy_text_assets, stop_ids
from qwen_export.engine_options import BOUND, EMBEDDED, EngineOptions
from qwen_export.graphs.call_sizes import DECODER
from qwen_export.graphs.checkpoint.adapters.adapter_hash import adapter_facts
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.formats.format_table import storage_summary
from qwen_export.graphs.checkpoint.tensor_names import stored_name
from qwen_export.graphs.quantization.calibrated_codes import with_codes
from qwen_export.graphs.quantization.precision_plan import PrecisionPlan
from qwen_export.graphs.rotary import rotary_axes, rotary_frequencies
from qwen_export.graphs.weights.block_budget import block_budget
from qwen_export.graphs.weights.journal import Journal
from qwen_export.graphs.weights.weight_writer import Resume, weight_bytes, write_weights
from qwen_export.manifest import (
    ADAPTERS,
    ROPE_SCALING,
    SCHEMA_VERSION,
    WEIGHTS,
    EngineSpec,
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
from qwen_export.manifest import write_manifest as store_manifest
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.runtimes.backends.compatibility import this_platform
from qwen_export.runtimes.backends.native_libraries import remember
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import load_library
from qwen_export.runtimes.memory.mapped_weights import weight_bytes as bytes_in_file
from qwen_export.stages import stage_groups, stage_weights
from qwen_export.version import __version__

Report = Callable[[str, int, int], None]
"""Progress: stage or tensor name, bytes of weights done, bytes of weights in all (0 before they are known)."""


def write_files(
    source: Checkpoint,
    plan: BuildPlan,
    models: dict[str, ir.Model],
    staging: Path,
    say: Report,
    jobs: int | None,
    max_memory: int | None,
) -> dict[str, FileEntry]:
    """Write weights, graphs, plugins and text assets; returns the files of the bundle."""
    graphs = list(models.values())
    total, done = weight_bytes(graphs), 0

    def progress(name: str, count: int) -> None:
        nonlocal done
        done += count
        say(name, done, total)

    with CheckpointReader(source) as reader:
        budget, files = block_budget(graphs, max_memory), dict[str, FileEntry]()
        values = with_codes(reader, plan.quantization.codes if plan.quantization else None)
        for number, (name, readers) in enumerate(weight_files(models).items()):
            resume = Resume(Journal(journal_path(staging, number)), values.identity)
            files[name] = write_weights(readers, values, staging / name, progress, jobs=jobs, budget=budget, resume=resume)
    for model in models.values():
        forget_origin(model)
        model.producer_name, model.producer_version = "qwen-export", __version__
        for node in model.graph:
            model.opset_imports.setdefault(node.domain, 1)
    graph_files = _write_engines(plan, models, staging, say) if plan.engine is not None else _write_onnx(plan, models, staging)
    if plan.engine is not None and _weights_inside(plan):
        del files[WEIGHTS]
        (staging / WEIGHTS).unlink()
    for library in plan.plugins:
        shutil.copyfile(library, staging / library.name)
    for name in (*graph_files, *(library.name for library in plan.plugins), *copy_text_assets(source.text_directory, staging)):
        files[name] = hash_file(staging / name)
    return files


def forget_origin(model: ir.Model) -> None:
    """Remove what the exporter notes of each node: lines of source code, with the paths of the machine that builds."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
        for noted in (graph, *graph, *values):
            noted.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.metadata_props.clear()


def weight_files(models: Mapping[str, ir.Model]) -> dict[str, list[ir.Model]]:
    """The files of weights, each with the graphs that read it: one for all graphs, or one per stage, the last with the draft head's."""
    stages = stage_groups(models).get(DECODER, [])
    if len(stages) < 2:
        return {WEIGHTS: list(models.values())}
    others = [model for name, model in models.items() if name not in stages]
    files = {stage_weights(number): [models[name]] for number, name in enumerate(stages)}
    files[stage_weights(len(stages) - 1)] += others
    return files


def _file(plan: BuildPlan, graph: str) -> str:
    return engine_file(graph) if plan.engine is not None else onnx_file(graph)


def _write_onnx(plan: BuildPlan, models: dict[str, ir.Model], staging: Path) -> list[str]:
    for graph, model in models.items():
        ir.save(with_inputs(model) if plan.host_experts else model, staging / onnx_file(graph))
    return [onnx_file(graph) for graph in models]


def _write_engines(plan: BuildPlan, models: dict[str, ir.Model], staging: Path, say: Report) -> list[str]:
    """The engines, and with `carry_onnx` the graphs that they were compiled from."""
    from qwen_export.plugins.tensorrt.parser_model import parser_model

    options, names = plan.engine or EngineOptions(), []
    library = load_library(plan.target.backend)
    for graph, model in models.items():
        say(f"compiling {graph}", 0, 0)
        proto = parser_model(model, bound=options.weights == BOUND).SerializeToString()
        places = {} if options.weights == BOUND else {w.name: (staging / w.file, w.offset, bytes_in_file(w)) for w in _weight_specs(model)}
        with mapped(places) as weights:
            compile_graph(library, graph, proto, staging / engine_file(graph), options, weights)
        names.append(engine_file(graph))
        if options.carry_onnx:
            (staging / onnx_file(graph)).write_bytes(proto)
            names.append(onnx_file(graph))
    return names


def _weights_inside(plan: BuildPlan) -> bool:
    """Whether the bundle needs no file of weights: its engines have them, and they will not be compiled again."""
    return plan.engine is not None and plan.engine.weights == EMBEDDED and not plan.engine.carry_onnx


def write_manifest(
    source: Checkpoint,
    plan: BuildPlan,
    models: dict[str, ir.Model],
    files: dict[str, FileEntry],
    references: dict[str, Reference],
    staging: Path,
    calibration: CalibrationText | None = None,
) -> None:
    text = source.config.text
    inv_freq, scaling = rotary_frequencies(text)
    # Operators of the plugins come with the bundle.
    nodes = [node for model in models.values() for node in model.graph]
    operators = sorted({f"{node.domain}.{node.op_type}" for node in nodes if node.domain and node.domain != NATIVE})
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
        rotary=RotarySpec(tuple(inv_freq), scaling, rotary_axes(text) if plan.vision.spec is not None else ()),
        graphs={name: _graph_spec(plan, name, model) for name, model in models.items()},
        files=files,
        references=references,
        plugins=tuple(library.name for library in plan.plugins),
        stop_ids=stop_ids(source.text_directory, text.eos_token_ids),
        speculation=plan.speculation,
        engine=_engine_spec(plan, models),
        vision=plan.vision.spec,
        precision_plan=_quantized_forms(source, plan.quantization)
        | {
            "weights": _weight_types(models.values(), plan.activations),
            "activations": plan.activations,
            "recurrent state": "fp32",
            "attention cache": plan.caches.name,
        }
        | (plan.quantization.to_json() if plan.quantization else {})
        | ({"calibration": str(calibration)} if calibration else {}),
        source={"architecture": source.config.architecture, "lowerings": {op: choice.name for op, choice in plan.choices.items()}}
        | ({ROPE_SCALING: source.rope_scaling} if source.rope_scaling else {})
        | ({ADAPTERS: adapter_facts(source.adapters)} if source.adapters else {}),
    )
    store_manifest(staging, manifest)
    remember(files[name].sha256 for name in manifest.plugins)


def _quantized_forms(source: Checkpoint, plan: PrecisionPlan | None) -> dict[str, str]:
    """What became of each quantized form that the decoder's weights were stored in."""
    prefix, kept_names = source.config.text_prefix, {stored_name(source.config, name) for name in (plan.kept if plan else ())}
    decoder = {name: weight for name, weight in source.weights.items() if name.startswith((prefix, "lm_head."))}
    weights = {name: weight for name, weight in decoder.items() if weight.quantized}
    forms, kept = storage_summary(weights), storage_summary({name: weights[name] for name in kept_names & weights.keys()})
    said = {}
    for form, count in forms.items():
        stay, become = kept.get(form, 0), count - kept.get(form, 0)
        parts = [f"{stay} kept"] * bool(stay) + [f"{become} dequantized"] * bool(become)
        said[f"stored as {form}"] = f"{count} weights, {', '.join(parts) if stay else 'dequantized'}"
    return said


def _weight_types(models: Iterable[ir.Model], precision: str) -> str:
    weights = (value for model in models for value in model.graph.initializers.values())
    kept = precision == "fp32" and any(value.dtype is not None and value.dtype.name == "BFLOAT16" for value in weights)
    return "fp32; projections, embedding and head bf16, as stored" if kept else precision


def _engine_spec(plan: BuildPlan, models: dict[str, ir.Model]) -> EngineSpec | None:
    if plan.engine is None:
        return None
    from qwen_export.plugins.tensorrt.step_plugin import needed_cuda

    onnx = tuple(models) if plan.engine.carry_onnx else ()
    return engine_spec(load_library(plan.target.backend), plan.engine, onnx, needed_cuda(models.values()))


def _graph_spec(plan: BuildPlan, name: str, model: ir.Model) -> GraphSpec:
    def spec(value: ir.Value) -> TensorSpec:
        if value.shape is None or value.dtype is None or value.name is None:
            raise AssertionError("the verifier refuses untyped signatures")
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
        return TensorSpec(value.name, value.dtype.name.lower(), shape)

    inputs = tuple(spec(v) for v in model.graph.inputs)
    outputs = tuple(spec(v) for v in model.graph.outputs)
    names = {t.name for t in outputs}
    states = tuple(_state_spec(model, t) for t in inputs if f"{t.name}.next" in names)
    weights = () if _weights_inside(plan) else tuple(_weight_specs(model))
    return GraphSpec(_file(plan, name), inputs, outputs, states, weights, expert_weights(model) if plan.host_experts else ())


# Operators of static graphs that write one buffer in place where input and output share it. The results of others may be written while
# the input is still read by nodes that come later.
_IN_PLACE = ("GroupQueryAttention", "ScatterND", "TensorScatter")


def _state_spec(model: ir.Model, tensor: TensorSpec) -> StateSpec:
    after = f"{tensor.name}.next"
    if not all(isinstance(d, int) for d in tensor.shape):
        return StateSpec(tensor.name, after, tensor.dtype, tensor.shape, grows="S" in tensor.shape)
    node = next(value for value in model.graph.outputs if value.name == after).producer()
    return StateSpec(
        tensor.name,
        after,
        tensor.dtype,
        tensor.shape,
        grows=tensor.name.endswith((".k_cache", ".v_cache")),
        in_place=node is not None and node.op_type in _IN_PLACE,
    )


def _weight_specs(model: ir.Model) -> Iterator[WeightSpec]:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            location = str(tensor.location)
            yield WeightSpec(value.name or "", location, tensor.dtype.name.lower(), tuple(tensor.shape.numpy()), tensor.offset or 0)
