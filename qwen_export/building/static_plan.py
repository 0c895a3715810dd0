"""What a build for a target with static shapes will make: a graph per size of call, over one file of weights. `bundle_contract.py` has
the table of graphs. Imports neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_export.bundle_contract import HEAD_PROMPT, HEAD_STEP, HEAD_VERIFY, PROMPT, STEP, VERIFY
from qwen_export.graphs.call_sizes import DECODER, HEAD, CallSizes, GraphPlan
from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.passes.lowering_choice import Choice
from qwen_export.plugins.standard.standard_choices import choose_standard
from qwen_export.targets import DECOMPOSABLE, Target

DEFAULT_CONTEXT = 4096
"""Attention reads every slot of a static cache in every step, so capacity costs time, not only memory."""

_DEFAULT_VERIFY = 4
_BLOCKS_SINCE = 21
_SLOT_MULTIPLE = 64


@dataclass(frozen=True)
class StaticOptions:
    """`chunk`: tokens per prompt call; None is the target's default. `step_tokens`: tokens that one verify reads, 1 for none; None is 4
    with speculation, else 1. `opset` None is the target's default. `decompose`: ops to build from simple ones, see DECOMPOSABLE.
    `picture_tokens`: tokens of the largest picture of each graph of the vision tower; smaller ones are filled up to the next size."""

    chunk: int | None = None
    step_tokens: int | None = None
    opset: int | None = None
    decompose: tuple[str, ...] = ()
    picture_tokens: tuple[int, ...] = (64, 256, 1024)

    def verified_tokens(self, *, speculates: bool) -> int:
        """Tokens that one verify reads; 1: there is none."""
        return (_DEFAULT_VERIFY if speculates else 1) if self.step_tokens is None else self.step_tokens


@dataclass(frozen=True)
class StaticPlan:
    """The graphs by name, the version of the standard they are written in, and the lowering of each op."""

    graphs: Mapping[str, GraphPlan]
    opset: int
    choices: dict[str, Choice]


def plan_static(
    target: Target,
    config: TextConfig,
    context: int,
    options: StaticOptions,
    verified: int,
    *,
    head: bool,
    quantized: bool = False,
    choices: dict[str, Choice] | None = None,
) -> tuple[StaticPlan, list[str]]:
    """The plan for verifies of `verified` tokens (1: none), with or without a draft head, and a message for each reason against it.
    `choices`: the lowering of each op, for targets with engines."""
    possible = [opset for opset in target.opsets if opset >= _BLOCKS_SINCE or not quantized]
    opset = possible[0] if options.opset is None else options.opset
    reasons: list[str] = []
    if choices is None:
        choices = choose_standard(target.name, config, opset, options.decompose)
    if opset not in target.opsets:
        reasons.append(f"target {target.name} has no opset {opset}, only {', '.join(map(str, sorted(target.opsets)))}")
    elif opset not in possible:
        reasons.append(f"quantized blocks are standard since opset {_BLOCKS_SINCE}, not in {opset}")
    unknown = sorted(set(options.decompose) - set(DECOMPOSABLE))
    if unknown:
        reasons.append(f"there is no op to decompose called {unknown[0]!r}, only {', '.join(DECOMPOSABLE)}")
    limit = min(target.longest_call, context)
    T, W = min(target.prompt_tokens, limit) if options.chunk is None else options.chunk, verified
    for name, value, least in (("chunk", T, 2), ("step", W, 1)):
        if not least <= value <= limit:
            reasons.append(f"a {name} of {value} tokens is outside {least}..{limit}")
    if target.engines and target.delta_chunk < T and T % target.delta_chunk:
        if options.chunk is None:
            T -= T % target.delta_chunk
        else:
            reasons.append(f"a chunk of {T} tokens is not a multiple of {target.delta_chunk}, what the delta rule takes at a time")
    # A padded call writes its padding behind the last token.
    slots = -(-(context + max(T, W)) // _SLOT_MULTIPLE) * _SLOT_MULTIPLE
    graphs = {STEP: GraphPlan(DECODER, CallSizes(1, 0, slots, 1, padded=False, hidden=head))}
    if W > 1:
        graphs[VERIFY] = GraphPlan(DECODER, CallSizes(W, W, slots, W, padded=True, hidden=head))
    graphs[PROMPT] = GraphPlan(DECODER, CallSizes(T, 0, slots, 0, padded=True, hidden=head, chunk=target.delta_chunk))
    if head:
        graphs[HEAD_STEP] = GraphPlan(HEAD, CallSizes(1, 0, slots, 1, padded=False, hidden=True))
        graphs[HEAD_VERIFY] = GraphPlan(HEAD, CallSizes(W, 0, slots, 1, padded=False, hidden=True))
        graphs[HEAD_PROMPT] = GraphPlan(HEAD, CallSizes(T, 0, slots, 0, padded=False, hidden=False))
    return StaticPlan(graphs, opset, choices), reasons
