"""What a build will do, decided before any weight is read and without torch: `inspect` prints it, `build` does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qwen_export.building.calibration.calibration_plan import CalibrationPlan, calibration_reasons, plan_calibration
from qwen_export.building.host_expert_limits import host_expert_reasons
from qwen_export.building.sequence_bytes import cache_bytes_per_token, state_bytes
from qwen_export.building.stage_plan import Stage, StageCosts, plan_stages
from qwen_export.building.static_plan import DEFAULT_CONTEXT as STATIC_CONTEXT
from qwen_export.building.static_plan import StaticOptions, plan_static
from qwen_export.building.vision_plan import VisionPlan, plan_vision
from qwen_export.building.weight_sizes import BYTES, group_sizes, weight_sizes
from qwen_export.cache_formats import CACHE_FORMATS, CacheFormat, cache_format_name
from qwen_export.engine_options import EngineOptions
from qwen_export.errors import ParameterError, UnsupportedError
from qwen_export.graphs.call_sizes import DECODER, HEAD, GraphPlan
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.tensor_names import (
    StoredLayout,
    check_tensors,
    mtp_tensors,
    no_draft_head,
    stored_tensors,
)
from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.passes.lowering_choice import Choice
from qwen_export.graphs.quantization.kept_grids import keep_stored
from qwen_export.graphs.quantization.plan_limits import check_one_format, standard_reasons
from qwen_export.graphs.quantization.precision_plan import FP8, INT4, INT8, QUANTIZED, PrecisionPlan, as_table, load_plan
from qwen_export.manifest import SpeculationSpec
from qwen_export.plugins.native.native_library import FP8_LINEAR, LIBRARIES, NATIVE, build_script, find_library, with_native
from qwen_export.plugins.onnxruntime.onnxruntime_choices import CHOICES, choose
from qwen_export.plugins.onnxruntime.recorded_kernels import recorded
from qwen_export.plugins.tensorrt.tensorrt_choices import UNQUANTIZED, choose_tensorrt, refusals
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_kernels import Kernels, installed
from qwen_export.targets import TARGETS, Target

DEFAULT_CONTEXT, DEFAULT_OPSET = 32768, 21
MAX_DRAFT = {"cpu": 8, "cuda": 7}
"""Longest draft of a round: with one more token it is what the products read a weight once for."""
# Ids of a byte-pair vocabulary are in the order of frequency. Reading the whole head for a draft costs a third of a step of the 0.8B.
_DRAFT_VOCAB, _SMALLEST_DRAFT_VOCAB = 65536, 16
# The interpreter with the backend loaded, and what a prefill chunk needs beside weights and states.
_BASE_BYTES = 250 << 20


@dataclass(frozen=True)
class BuildPlan:
    """A supported build: the target with its lowerings, and what it will cost in bytes."""

    target: Target
    device: str
    precision: str
    max_context: int
    choices: dict[str, Choice]
    bundle_bytes: int
    state_bytes: int
    cache_bytes_per_token: int
    speculation: SpeculationSpec | None = None
    """How calls may leave tokens pending, None when they may not."""
    no_head: str = ""
    """Why there is no draft head, "" when there is one."""
    quantization: PrecisionPlan | None = None
    group_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Per group of the precision plan: parameters and bytes."""
    graphs: Mapping[str, GraphPlan] = field(default_factory=dict)
    """The graphs of the bundle by name."""
    opset: int = DEFAULT_OPSET
    """The version of the ONNX standard."""
    engine: EngineOptions | None = None
    """How the graphs are compiled, None where the target's runtime does that."""
    vision: VisionPlan = field(default_factory=VisionPlan)
    """How the bundle reads pictures, or why it does not."""
    stages: tuple[Stage, ...] = ()
    """Of the decoder, in order; one where it is not cut."""
    host_experts: bool = False
    """Whether routed experts are inputs of the graphs, which a GPU may read from host memory."""
    checkpoint_notes: tuple[str, ...] = ()
    """What was ignored or decided when the checkpoint was read, in one line each."""
    cache_precision: str = ""
    """What attention caches keep of values, "" for the precision of the activations."""
    calibration: CalibrationPlan | None = None
    """With which text codes are chosen, None where weights alone choose them."""

    @property
    def activations(self) -> str:
        """The precision of activations, and of weights that are not quantized."""
        return activation_precision(self.precision, self.device)

    @property
    def caches(self) -> CacheFormat:
        return CACHE_FORMATS[self.cache_precision or self.activations]

    @property
    def notes(self) -> list[str]:
        """For people: notes on the checkpoint, the precision plan where something is quantized, and why there is no draft head."""
        table = as_table(self.quantization, self.group_sizes) if self.quantization else []
        missing = [("draft head", self.no_head), ("pictures", self.vision.reason)]
        table += [self.calibration.note] if self.calibration else []
        return [*self.checkpoint_notes, *table, *(f"no {what}: {why}" for what, why in missing if why)]

    @property
    def plugins(self) -> tuple[Path, ...]:
        """Libraries with kernels that the graph uses: they become part of the bundle."""
        library = find_library(self.device)
        native = any(kernel.domain == NATIVE for choice in self.choices.values() for kernel in choice.kernels)
        return (library,) if native and library is not None else ()

    @property
    def run_bytes(self) -> int:
        """Estimated peak memory of a run with a full context."""
        return _BASE_BYTES + self.bundle_bytes + self.state_bytes + self.max_context * self.cache_bytes_per_token


def plan_build(
    checkpoint: Checkpoint,
    target: str = "onnxruntime",
    device: str = "cpu",
    precision: str = "fp32",
    max_context: int | None = None,
    *,
    mtp: bool = True,
    draft_vocab: int | None = None,
    lookup: bool = False,
    vision: bool | None = None,
    cache_precision: str | None = None,
    plan_file: Path | None = None,
    calibrate: str | Path | None = None,
    options: StaticOptions | None = None,
    engine: EngineOptions | None = None,
    stages: int | None = None,
    device_memory: int | None = None,
    host_experts: bool = False,
) -> BuildPlan:
    """Decide how to build, or raise UnsupportedError with every reason at once. `mtp`, `draft_vocab`, `lookup`, `vision`,
    `cache_precision`, `calibrate`, `options`, `engine`, `stages`, `device_memory` and `host_experts` as in `build`, but that memory which
    is not given is not looked up. `plan_file` overrides the precision plan that "int8" and "int4" stand for; ConfigError where it is
    wrong."""
    if target not in TARGETS:
        raise ParameterError(
            "there is no such target", parameter="target", got=target, expected=", ".join(TARGETS), fix="Choose one of these for {target}."
        )
    chosen, config = TARGETS[target], checkpoint.config.text
    reasons = _checkpoint_reasons(checkpoint)
    stored = StoredLayout.of(checkpoint)
    if device not in chosen.devices:
        reasons.append(f"target {target} has no device {device!r}, only {', '.join(chosen.devices)}")
    if precision not in chosen.precisions:
        reasons.append(f"target {target} has no precision {precision!r}, only {', '.join(chosen.precisions)}")
    limit = config.max_position_embeddings
    default = STATIC_CONTEXT if chosen.static else DEFAULT_CONTEXT
    context = min(default, limit) if max_context is None else max_context
    if not 0 < context <= limit:
        reasons.append(f"a context of {context} tokens is outside 1..{limit}, what the checkpoint's max_position_embeddings allows")
    wishes = _Wishes(_no_head(checkpoint, mtp), lookup, draft_vocab)
    activations, quantization = activation_precision(precision, device), None
    if precision in QUANTIZED and precision in chosen.precisions:
        whole = UNQUANTIZED if chosen.engines else ()
        quantization = load_plan(
            precision,
            plan_file,
            tied=config.tie_word_embeddings,
            stored=whole,
            calibrated=calibrate is not None,
            fp8_block=chosen.fp8_block,
        )
    compiled, fixed = engine or EngineOptions(), options or StaticOptions()
    if chosen.engines:
        reasons += refusals(config, quantization, compiled.sms, compiled.plugins)
    elif quantization is not None and FP8 in quantization.formats and FP8 not in chosen.precisions:
        reasons.append(f"target {target} has no fp8 weights")
    kept = cache_format_name(activations, cache_precision)
    if chosen.static:
        if kept != activations:
            reasons.append(f"target {target} keeps attention caches in the precision of the activations, {activations}, not in {kept}")
        form = _static_form(chosen, config, context, wishes, fixed, activations, compiled, quantized=quantization is not None)
    elif device in chosen.devices and precision in chosen.precisions:
        form = _free_form(device, precision, config, wishes, quantization, kept)
    else:
        form = _Form({}, {}, None, wishes.no_head)
    reasons += form.refused
    seen = kernels_for(device) if chosen.vision_passes and not chosen.static and device in chosen.devices else None
    sight, blind = plan_vision(checkpoint, chosen, seen, activations, vision, fixed.picture_tokens)
    reasons += blind
    tensors = [*stored_tensors(config, stored), *(() if form.no_head else mtp_tensors(config, stored)), *sight.tensors()]
    if quantization is not None:
        check_one_format(quantization, (name for name, _ in tensors))
        if chosen.static:
            reasons += standard_reasons(quantization, tensors, engines=chosen.engines)
    if plan_file is not None and precision not in QUANTIZED:
        reasons.append(f"a precision plan overrides the precisions {', '.join(QUANTIZED[:-1])} or {QUANTIZED[-1]}, not {precision}")
    reasons += host_expert_reasons(chosen, config, quantization, stages) if host_experts else []
    reasons += calibration_reasons(chosen, precision, quantization, calibrate)
    if reasons:
        raise UnsupportedError(
            "this checkpoint cannot be built for this target",
            where=str(checkpoint.path),
            got="; ".join(reasons),
            fix="Change what is named, or choose another {target}, {device} or {precision}; `qwen-export inspect` lists what can be built.",
        )
    head = not form.no_head
    check_tensors(checkpoint, mtp=head, vision=sight.config)
    size = BYTES[activations]
    if quantization is not None and checkpoint.config.quantization:
        quantization = keep_stored(quantization, checkpoint, [name for name, _ in tensors])
        if chosen.engines:  # they have no zeros
            quantization = replace(quantization, kept={name: kept for name, kept in quantization.kept.items() if not kept.zeros})
    calibration = None
    if quantization is not None and calibrate is not None:
        calibration = plan_calibration(config, quantization, calibrate, tensors)
    choices = form.choices | sight.choices
    sizes = weight_sizes(checkpoint, activations, choices, quantization, tensors, standard=chosen.static)
    groups = group_sizes(sizes)
    return BuildPlan(
        chosen,
        device,
        precision,
        context,
        choices,
        bundle_bytes=sum(nbytes for _, nbytes in groups.values()),
        state_bytes=state_bytes(config, size),
        cache_bytes_per_token=cache_bytes_per_token(config, CACHE_FORMATS[kept], head=head),
        speculation=form.speculation,
        no_head=form.no_head,
        quantization=quantization,
        group_sizes=groups,
        graphs={**form.graphs, **sight.graphs},
        vision=sight,
        stages=plan_stages(
            stages,
            StageCosts.of(config, sizes, context, size, CACHE_FORMATS[kept], head=head),
            form.graphs,
            device_memory if device == "cuda" and not host_experts else None,
        ),
        host_experts=host_experts,
        opset=form.opset,
        engine=compiled if chosen.engines else None,
        checkpoint_notes=checkpoint.notes,
        cache_precision=kept,
        calibration=calibration,
    )


def default_precision(checkpoint: Checkpoint, target: str, device: str) -> str:
    """The precision of a build for which none is given: that of the codes that the checkpoint stores, where the target's kernels take them
    unchanged; else fp32 on the CPU and fp16 elsewhere."""
    usual = "fp32" if device == "cpu" else "fp16"
    if not checkpoint.config.quantization or not {INT4, INT8} <= set(TARGETS[target].precisions) or TARGETS[target].engines:
        return usual
    for precision in (INT4, INT8, *({FP8} & set(TARGETS[target].precisions))):
        try:
            plan = plan_build(checkpoint, target, device, precision)
        except UnsupportedError:
            return usual
        # A plan of 4 bits has a head of 8, and keeps a head of 8 bits whatever the other matrices are.
        if plan.quantization is not None and any(kept.format == precision for kept in plan.quantization.kept.values()):
            return precision
    return usual


def activation_precision(precision: str, device: str) -> str:
    """The precision of what is not quantized."""
    if precision not in QUANTIZED:
        return precision
    return "fp32" if device == "cpu" else "fp16"


@dataclass(frozen=True)
class _Wishes:
    """What is wanted of speculation. `no_head`: why there can be no draft head, "" when there can."""

    no_head: str
    lookup: bool
    draft_vocab: int | None

    def speculation(self, config: TextConfig, longest: int, *, head: bool) -> SpeculationSpec | None:
        """How calls may leave up to `longest` drafts pending; None where there are no drafts."""
        if not head:
            return SpeculationSpec(longest, 0) if self.lookup else None
        if self.draft_vocab is not None and self.draft_vocab < _SMALLEST_DRAFT_VOCAB:
            raise ParameterError(
                "the draft vocabulary is too small",
                parameter="draft_vocab",
                got=self.draft_vocab,
                expected=f"at least {_SMALLEST_DRAFT_VOCAB}",
                fix="Raise {draft_vocab}.",
            )
        return SpeculationSpec(longest, min(self.draft_vocab or _DRAFT_VOCAB, config.vocab_size))


@dataclass(frozen=True)
class _Form:
    """The graphs that a target can make, how ops are lowered in them, and a message for each reason against it."""

    graphs: Mapping[str, GraphPlan]
    choices: dict[str, Choice]
    speculation: SpeculationSpec | None
    no_head: str
    opset: int = DEFAULT_OPSET
    refused: Sequence[str] = ()


def _free_form(device: str, precision: str, config: TextConfig, wishes: _Wishes, quantization: PrecisionPlan | None, caches: str) -> _Form:
    """One graph for calls of any size, and one for the draft head."""
    kernels, activations, no_head = kernels_for(device), activation_precision(precision, device), wishes.no_head
    experts = quantization is not None and quantization.groups["experts"].quantized
    speculation = wishes.speculation(config, MAX_DRAFT[device], head=not no_head)
    choices, refused = choose(kernels, activations, config, transaction=speculation is not None, quantized_experts=experts, caches=caches)
    if refused and speculation is not None:
        speculation, no_head = None, f"{refused[0]} that can leave tokens pending"
        choices, refused = choose(kernels, activations, config, quantized_experts=experts, caches=caches)
    if quantization is not None:
        refused += _quantization_reasons(device, precision, config, choices, quantization)
    if refused and device == "cpu" and precision != "fp32":
        refused = [*refused, "for this device build in fp32"]
    graphs = {DECODER: GraphPlan(DECODER)} | ({} if no_head else {HEAD: GraphPlan(HEAD)})
    return _Form(graphs, choices, speculation, no_head, refused=refused)


def _static_form(
    target: Target,
    config: TextConfig,
    context: int,
    wishes: _Wishes,
    options: StaticOptions,
    activations: str,
    engine: EngineOptions,
    *,
    quantized: bool,
) -> _Form:
    """A graph per size of call; a verify of more than one token is what speculation needs."""
    verified = options.verified_tokens(speculates=wishes.lookup or not wishes.no_head)
    no_head = wishes.no_head or ("built with one token per verify (step_tokens)" if verified == 1 else "")
    choices = choose_tensorrt(target.name, activations, config, engine.sms, engine.plugins) if target.engines else None
    static, refused = plan_static(target, config, context, options, verified, head=not no_head, quantized=quantized, choices=choices)
    speculation = replace(wishes, lookup=verified > 1).speculation(config, verified - 1, head=not no_head)
    return _Form(static.graphs, static.choices, speculation, no_head, static.opset, refused)


def _no_head(checkpoint: Checkpoint, mtp: bool) -> str:
    """Why a build has no draft head, "" when it has one."""
    return no_draft_head(checkpoint) if mtp else "built without it on request (mtp)"


def kernels_for(device: str) -> Kernels:
    """Kernels of the installed ONNX Runtime; for a device that it was not built with, those recorded from a release that was. Our own
    are among them where their library is found."""
    return with_native(installed(device) or recorded(device))


def _checkpoint_reasons(checkpoint: Checkpoint) -> list[str]:
    reasons = []
    try:
        _ = checkpoint.weights
    except UnsupportedError as error:
        reasons.append(str(error).removesuffix("."))
    if checkpoint.vocabulary_reason:
        reasons.append(checkpoint.vocabulary_reason)
    return reasons


def _quantization_reasons(device: str, precision: str, config: TextConfig, choices: dict[str, Choice], plan: PrecisionPlan) -> list[str]:
    """Why the products of this build cannot be quantized as the plan says."""
    if FP8 in plan.formats and FP8_LINEAR not in LIBRARIES[device].ops:
        return [f"there are no products with fp8 weights on {device}, only on cuda: {INT8} takes as many bytes here"]
    if "linear" in choices and choices["linear"].name != "native_linear":
        limit = CHOICES[device]["linear"][0].limit(config)
        return [f"{precision}: {limit}" if limit else f"{precision} needs the library of native kernels: run `sh {build_script(device)}`"]

    def quantized(*groups: str) -> bool:
        return any(plan.groups[group].quantized for group in groups)

    reasons = []
    if "moe" in choices and quantized("experts") and choices["moe"].name == "microsoft_moe":
        limit = "; ".join(choice.limit(config) for choice in CHOICES[device]["moe"] if choice.limit(config))
        reasons.append(f"the experts cannot be quantized: {limit or 'the library has no kernel for them'}")
    widths = {
        "intermediate size": config.intermediate_size * quantized("mlp", "mtp"),
        "shared expert's width": config.shared_expert_intermediate_size * quantized("shared_expert", "mtp"),
    }
    odd = [f"{name} {width}" for name, width in widths.items() if width % 16]
    if odd:
        reasons.append(f"quantized feed-forward blocks need multiples of 16, and this model has {', '.join(odd)}")
    return reasons
