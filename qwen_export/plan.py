"""What a build will do, decided before any weight is read and without torch: `inspect` prints it, `build` carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from qwen_export.errors import UnsupportedError
from qwen_export.graphs.checkpoint.directory import Checkpoint
from qwen_export.graphs.checkpoint.names import StoredLayout, check_tensors, has_mtp, mtp_tensors, stored_dtypes, stored_tensors
from qwen_export.graphs.config import FULL, TextConfig
from qwen_export.graphs.quantization.kept import keep_stored
from qwen_export.graphs.quantization.plan import INT4, INT8, QUANTIZED, PrecisionPlan, as_table, group_of, load_plan
from qwen_export.manifest import SpeculationSpec
from qwen_export.plugins.native.library import NATIVE, find_library, with_native
from qwen_export.plugins.onnxruntime.choices import Choice, choose
from qwen_export.plugins.onnxruntime.recorded import recorded
from qwen_export.runtimes.onnxruntime_kernels import Kernels, installed
from qwen_export.static_plan import DEFAULT_CONTEXT as STATIC_CONTEXT
from qwen_export.static_plan import StaticOptions, StaticPlan, plan_static
from qwen_export.targets import TARGETS, Target

DEFAULT_CONTEXT = 32768
MAX_DRAFT = {"cpu": 8, "cuda": 7}
"""Longest draft of a round: with one more token it is what the products read a weight once for."""
# Ids of a byte-pair vocabulary are in the order of frequency. Reading the whole head for a draft costs a third of a step of the 0.8B.
_DRAFT_VOCAB, _SMALLEST_DRAFT_VOCAB = 65536, 16
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
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

    @property
    def activations(self) -> str:
        """The precision of activations and caches, and of weights that are not quantised."""
        return activation_precision(self.precision, self.device)

    @property
    def quantization_lines(self) -> list[str]:
        """The precision plan for people; nothing where nothing is quantised."""
        return as_table(self.quantization, self.group_sizes) if self.quantization else []

    static: StaticPlan | None = None
    """The graphs of a target with static shapes."""

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
    plan_file: Path | None = None,
    options: StaticOptions | None = None,
) -> BuildPlan:
    """Decide how to build, or raise UnsupportedError with every reason at once. `mtp`, `draft_vocab`, `lookup` and `options` as in `build`.
    `plan_file` overrides the precision plan that "int8" and "int4" stand for; ConfigError where it is wrong."""
    if target not in TARGETS:
        raise UnsupportedError("there is no such target", got=target, expected=", ".join(TARGETS))
    chosen, config = TARGETS[target], checkpoint.config.text
    reasons = _checkpoint_reasons(checkpoint)
    if device not in chosen.devices:
        reasons.append(f"target {target} has no device {device!r}, only {', '.join(chosen.devices)}")
    if precision not in chosen.precisions:
        reasons.append(f"target {target} has no precision {precision!r}, only {', '.join(chosen.precisions)}")
    limit = config.max_position_embeddings
    default = STATIC_CONTEXT if chosen.static else DEFAULT_CONTEXT
    context = min(default, limit) if max_context is None else max_context
    if not 0 < context <= limit:
        reasons.append(f"a context of {context} tokens is outside 1..{limit}, what the checkpoint's max_position_embeddings allows")
    speculation, no_head = _speculation(checkpoint, device, mtp, draft_vocab, lookup)
    quantization: PrecisionPlan | None = None
    if precision in QUANTIZED and precision in chosen.precisions:
        quantization = load_plan(precision, plan_file, tied=config.tie_word_embeddings)
    activations = activation_precision(precision, device)
    choices: dict[str, Choice] = {}
    static: StaticPlan | None = None
    if chosen.static:
        options = options or StaticOptions()
        static, choices, refused = plan_static(chosen, config, context, options)
        reasons += refused
        no_head = f"target {chosen.name} has no draft head"
        speculation = SpeculationSpec(options.step_tokens - 1, 0) if options.step_tokens > 1 else None
    elif device in chosen.devices and precision in chosen.precisions:
        kernels = kernels_for(device)
        experts = quantization is not None and quantization.groups["experts"].quant is not None
        choices, refused = choose(kernels, activations, config, transaction=speculation is not None, quantized_experts=experts)
        if refused and speculation is not None:
            speculation, no_head = None, f"{refused[0]} that can leave tokens pending"
            choices, refused = choose(kernels, activations, config, quantized_experts=experts)
        if quantization is not None:
            refused += _quantization_reasons(device, precision, config, choices)
        if refused and device == "cpu" and precision != "fp32":
            refused = [*refused, "build for this device with --precision fp32"]
        reasons += refused
    if plan_file is not None and precision not in QUANTIZED:
        reasons.append(f"a precision plan overrides --precision {' or '.join(QUANTIZED)}, not {precision}")
    if reasons:
        raise UnsupportedError("this checkpoint cannot be built for this target", where=str(checkpoint.path), got="; ".join(reasons))
    check_tensors(checkpoint, mtp=not no_head)
    stored = StoredLayout.of(checkpoint)
    tensors = [*stored_tensors(config, stored), *(() if no_head else mtp_tensors(config, stored))]
    size = BYTES[activations]
    if quantization is not None and checkpoint.config.quantization:
        quantization = keep_stored(quantization, checkpoint, [name for name, _ in tensors])
    groups = _group_sizes(checkpoint, activations, choices, quantization, tensors)
    return BuildPlan(
        chosen,
        device,
        precision,
        context,
        choices,
        bundle_bytes=sum(nbytes for _, nbytes in groups.values()),
        state_bytes=state_bytes(config, size),
        cache_bytes_per_token=cache_bytes_per_token(config, size, head=not no_head),
        speculation=speculation,
        no_head=no_head,
        quantization=quantization,
        group_sizes=groups,
        static=static,
    )


def default_precision(checkpoint: Checkpoint, target: str, device: str) -> str:
    """The precision of a build that is told none: that of the codes that the checkpoint stores, where the target's kernels take them as
    they are; else fp32 on the CPU and fp16 elsewhere."""
    usual = "fp32" if device == "cpu" else "fp16"
    if not checkpoint.config.quantization or not set(QUANTIZED) <= set(TARGETS[target].precisions):
        return usual
    for precision in (INT4, INT8):
        try:
            plan = plan_build(checkpoint, target, device, precision)
        except UnsupportedError:
            return usual
        if plan.quantization is not None and plan.quantization.kept:
            return precision
    return usual


def activation_precision(precision: str, device: str) -> str:
    """The precision of what is not quantised."""
    if precision not in QUANTIZED:
        return precision
    return "fp32" if device == "cpu" else "fp16"


def _speculation(
    checkpoint: Checkpoint, device: str, mtp: bool, draft_vocab: int | None, lookup: bool
) -> tuple[SpeculationSpec | None, str]:
    """What speculation the checkpoint and the wishes allow, and why there is no draft head."""
    config, longest = checkpoint.config.text, MAX_DRAFT.get(device, 0)
    if not mtp:
        why = "built with --no-mtp"
    elif not has_mtp(checkpoint):
        why = "the checkpoint has no draft head (mtp.*)"
    elif config.mtp_num_hidden_layers > 1:
        why = f"its draft head has {config.mtp_num_hidden_layers} layers, and only one is implemented"
    else:
        if draft_vocab is not None and draft_vocab < _SMALLEST_DRAFT_VOCAB:
            raise UnsupportedError(
                "the draft vocabulary is too small",
                got=draft_vocab,
                expected=f"at least {_SMALLEST_DRAFT_VOCAB}",
                fix="Raise --draft-vocab.",
            )
        return SpeculationSpec(longest, min(draft_vocab or _DRAFT_VOCAB, config.vocab_size)), ""
    return (SpeculationSpec(longest, 0) if lookup else None), why


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
    return reasons


def _quantization_reasons(device: str, precision: str, config: TextConfig, choices: dict[str, Choice]) -> list[str]:
    """Why the products of this build cannot be quantised."""
    if "linear" in choices and choices["linear"].name != "native_linear":
        script = "plugins/native/cpu/build.sh" if device == "cpu" else "plugins/native/build.sh"
        return [f"{precision} needs the library of native kernels, which {script} builds"]
    widths = {"intermediate size": config.intermediate_size, "shared expert's width": config.shared_expert_intermediate_size}
    odd = [f"{name} {width}" for name, width in widths.items() if width % 16]
    return [f"quantised feed-forward blocks need multiples of 16, and this model has {', '.join(odd)}"] if odd else []


def _group_sizes(
    checkpoint: Checkpoint,
    precision: str,
    choices: dict[str, Choice],
    quantization: PrecisionPlan | None,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
) -> dict[str, tuple[int, int]]:
    """Parameters and bytes of each group of matrices, and under "" of everything else. Matrices that are not quantised stay BF16 where
    graphs.passes.keep_stored_bf16 leaves them so."""
    stored, sizes = stored_dtypes(checkpoint), dict[str, tuple[int, int]]()
    native = {op for op, choice in choices.items() if choice.name in ("native_linear", "native_moe")} if precision == "fp32" else set()
    for name, shape in tensors:
        format = quantization.of(name).quant if quantization else None
        if format is not None:
            panels, width = format.packed_shape(prod(shape[:-1]), shape[-1])
            nbytes = panels * width
        else:
            read_by = "moe" if ".mlp.experts." in name else "linear" if len(shape) == 2 else ""
            keeps = read_by in native and stored[name] == "BF16"
            nbytes = prod(shape) * BYTES["bf16" if keeps else precision]
        parameters, total = sizes.get(group_of(name), (0, 0))
        sizes[group_of(name)] = (parameters + prod(shape), total + nbytes)
    return sizes


def state_bytes(config: TextConfig, size: int) -> int:
    """Recurrent states (fp32) and convolution histories of one sequence."""
    layers = sum(kind != FULL for kind in config.layer_types)
    recurrent = 4 * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    return layers * (recurrent + size * (config.linear_conv_kernel_dim - 1) * config.conv_dim)


def cache_bytes_per_token(config: TextConfig, size: int, *, head: bool = False) -> int:
    """Keys and values of one token over all attention layers, that of the draft head among them with `head`."""
    return (sum(kind == FULL for kind in config.layer_types) + head) * 2 * size * config.num_key_value_heads * config.head_dim
