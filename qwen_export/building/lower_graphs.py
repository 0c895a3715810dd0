"""From a checkpoint and a plan to the graphs of the target: capture, stored layout, passes. Loads torch, and reads no weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from qwen_export.building.build_plan import BuildPlan
from qwen_export.building.pass_pipeline import run_passes
from qwen_export.graphs.call_sizes import DECODER, HEAD, TOWER, CallSizes
from qwen_export.graphs.capture import capture_decoder, capture_mtp, capture_vision
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.tensor_names import StoredLayout, stored_dtypes
from qwen_export.graphs.models.draft_head_model import mtp_config
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.stage_cut import cut_stages
from qwen_export.graphs.weights.stored_layout import resolve_layout
from qwen_export.stages import stage_name


def lower(source: Checkpoint, plan: BuildPlan, dump: Path | None = None) -> dict[str, ir.Model]:
    """The plan's graphs by name, after the target's passes. Several graphs of one module share one trace. `dump` gets a folder per graph,
    with a text file per phase."""
    text, stored = source.config.text, stored_dtypes(source)
    traced = {
        module: _capture(source, plan, module) for module in {graph.module: None for graph in plan.graphs.values()} if module != TOWER
    }
    models: dict[str, ir.Model] = {}
    for name, graph in plan.graphs.items():
        config = mtp_config(text) if graph.module == HEAD else text
        context = PassContext(
            config,
            plan.activations,
            plan.choices,
            stored,
            speculation=plan.speculation is not None if graph.sizes is None else graph.sizes.P > 0,
            quantization=plan.quantization,
            sizes=graph.sizes,
            opset=plan.opset,
            draft_vocab=plan.speculation.draft_vocab if plan.speculation is not None else 0,
            stage_starts=tuple(stage.first for stage in plan.stages) if name == DECODER else (),
        )
        # A tower's trace is short, and has the sizes that the graph is for.
        models[name] = _capture_tower(source, plan, graph.sizes) if graph.module == TOWER else traced[graph.module].clone()
        target = replace(plan.target, passes=plan.target.vision_passes) if graph.module == TOWER else plan.target
        run_passes(models[name], target, context, dump / name if dump else None)
    if len(plan.stages) > 1:
        stages = cut_stages(models.pop(DECODER), [stage.first for stage in plan.stages])
        models = {stage_name(DECODER, number): stage for number, stage in enumerate(stages)} | models
    return models


def _capture(source: Checkpoint, plan: BuildPlan, module: str) -> ir.Model:
    text, features = source.config.text, plan.vision.spec is not None
    if module == HEAD:
        if plan.speculation is None:
            raise ValueError("a plan without speculation has no draft head")
        model = capture_mtp(text, plan.activations, plan.speculation.draft_vocab, features=features, caches=plan.caches)
    else:
        model = capture_decoder(text, plan.activations, features=features, caches=plan.caches)
    resolve_layout(model, text, StoredLayout.of(source))
    return model


def _capture_tower(source: Checkpoint, plan: BuildPlan, sizes: CallSizes | None) -> ir.Model:
    if plan.vision.config is None:
        raise ValueError("a plan without pictures has no tower")
    model = capture_vision(plan.vision.config, plan.activations, sizes.T if sizes is not None else None)
    resolve_layout(model, source.config.text, StoredLayout.of(source))
    return model
