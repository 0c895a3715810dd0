"""What a build for a target with static shapes will make: a graph for steps and one for prompts, over one file of weights.

Imports neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_export.graphs.call_sizes import DECODER, CallSizes, GraphPlan
from qwen_export.graphs.config import TextConfig
from qwen_export.plugins.onnxruntime.choices import Choice
from qwen_export.plugins.standard.choices import DECOMPOSABLE, choose_standard
from qwen_export.plugins.tensorrt.choices import choose_tensorrt
from qwen_export.targets import Target

DEFAULT_CONTEXT = 4096
"""Attention reads every slot of a static cache in every step, so capacity costs time, not only memory."""

STEP, PROMPT = "decoder", "prefill"
_SLOT_MULTIPLE = 64


@dataclass(frozen=True)
class StaticOptions:
    """`chunk`: tokens per prompt call; None is the target's default. `step_tokens`: tokens per step; more than one is for speculative
    verification. `opset` None is the target's default. `decompose`: ops to build from simple ones, see DECOMPOSABLE."""

    chunk: int | None = None
    step_tokens: int = 1
    opset: int | None = None
    decompose: tuple[str, ...] = ()


@dataclass(frozen=True)
class StaticPlan:
    """The graphs by name, the version of the standard they are written in, and the lowering of each op."""

    graphs: Mapping[str, GraphPlan]
    opset: int
    choices: dict[str, Choice]


def plan_static(
    target: Target, config: TextConfig, context: int, options: StaticOptions, activations: str = "fp32"
) -> tuple[StaticPlan, list[str]]:
    """The plan, and a sentence for each reason against it. `activations`: their precision."""
    opset = target.opsets[0] if options.opset is None else options.opset
    reasons: list[str] = []
    if target.engines:
        choices = choose_tensorrt(activations, config)
    else:
        choices, reasons = choose_standard(target.name, config, opset, options.decompose)
    if opset not in target.opsets:
        reasons.append(f"target {target.name} has no opset {opset}, only {', '.join(map(str, sorted(target.opsets)))}")
    unknown = sorted(set(options.decompose) - set(DECOMPOSABLE))
    if unknown:
        reasons.append(f"there is nothing to decompose called {unknown[0]!r}, only {', '.join(DECOMPOSABLE)}")
    limit = min(target.longest_call, context)
    T, W = min(target.prompt_tokens, limit) if options.chunk is None else options.chunk, options.step_tokens
    for name, value, least in (("chunk", T, 2), ("step", W, 1)):
        if not least <= value <= limit:
            reasons.append(f"a {name} of {value} tokens is outside {least}..{limit}")
    if target.engines and T > target.delta_chunk and T % target.delta_chunk:
        if options.chunk is None:
            T -= T % target.delta_chunk
        else:
            reasons.append(f"a chunk of {T} tokens is not a multiple of {target.delta_chunk}, what the delta rule takes at a time")
    # A padded call writes its padding behind the last token.
    slots = -(-(context + max(T, W)) // _SLOT_MULTIPLE) * _SLOT_MULTIPLE
    graphs = {
        STEP: GraphPlan(DECODER, CallSizes(W, W if W > 1 else 0, slots, W, padded=W > 1, hidden=W > 1)),
        # It has no LM head: a prompt's last token is read by a step.
        PROMPT: GraphPlan(DECODER, CallSizes(T, 0, slots, 0, padded=True, hidden=W > 1, chunk=target.delta_chunk)),
    }
    return StaticPlan(graphs, opset, choices), reasons
