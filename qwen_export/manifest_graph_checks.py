"""Whether the signatures of a manifest's graphs fit the model, the states and each other. All functions raise ValueError."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from qwen_export.bundle_contract import FEATURES, PLACES, is_tower
from qwen_export.cache_formats import BY_ELEMENT
from qwen_export.manifest_types import DIMS, READ_AGAIN, GraphSpec, Manifest, StateSpec, TensorSpec
from qwen_export.manifest_vision_checks import check_vision
from qwen_export.stages import joined_graphs, links, stage_groups, stage_name

ROLES = ("decoder", "verify", "prefill", "mtp", "mtp_verify", "mtp_prefill")
_CONTROLS = ("length", "last_slot", "total_length", "accepted", "commit", "logit_rows")
_INPUTS = frozenset(("input_ids", "hidden", "cos", "sin", *_CONTROLS, FEATURES, PLACES))
_LENGTHS = (("length",), ("last_slot", "total_length"))
"""Inputs that tell how many tokens each sequence has, by the kernel of attention: a graph has those of one."""
_OUTPUTS = frozenset(("logits", "hidden", "hidden_out", "top_logits", "top_ids"))
_LARGEST_DIM = 2**31 - 1
_MOST_DIMS = 8
_MOST_GRAPH_TENSORS = 100_000

Shape = tuple[int | str, ...]


def check_graphs(manifest: Manifest) -> None:
    """Raise ValueError where a graph's inputs, outputs or states do not fit."""
    static = "prefill" in manifest.graphs
    for name, graph in manifest.graphs.items():
        if is_tower(name):
            continue
        role, dot, number = name.partition(".")
        if role not in ROLES or (not static and role not in ("decoder", "mtp")):
            raise ValueError(f"graphs has one of an unknown role: {name}")
        if dot and (static or role != "decoder" or not (number.isascii() and number.isdigit() and number == str(int(number)))):
            raise ValueError(f"graphs has a stage that cannot be: {name}")
        if graph.file not in manifest.files:
            raise ValueError(f"the file of graph {name} is not listed: {graph.file}")
    for role, names in stage_groups(manifest.graphs).items():
        if names != [role]:
            _check_stages(manifest, role, names)
    whole = joined_graphs({name: graph for name, graph in manifest.graphs.items() if not is_tower(name)})
    if "decoder" not in whole:
        raise ValueError("graphs has no decoder")
    check_vision(manifest, whole["decoder"])
    for name, graph in whole.items():
        _check_signature(name, graph, static=static)
        _check_states(manifest, name, graph)
        _check_shapes(manifest, name, graph)
    if static:
        _check_static(manifest)


def _check_stages(manifest: Manifest, role: str, names: Sequence[str]) -> None:
    """Stages are numbered from 0, what one reads of another is what an earlier one computes, and inputs they share are alike."""
    if names != [stage_name(role, number) for number in range(len(names))] or len(names) < 2:
        raise ValueError(f"the stages of graph {role} are not numbered from 0 to at least 1")
    stages = [manifest.graphs[name] for name in names]
    computed: dict[str, TensorSpec] = {}
    shared: dict[str, TensorSpec] = {}
    inner = links(stages)
    for name, graph in zip(names, stages, strict=True):
        for tensor in graph.inputs:
            if tensor.name in inner and tensor.name not in computed:
                raise ValueError(f"graph {name} reads {tensor.name}, which no earlier stage computes")
            known = computed.get(tensor.name) or shared.setdefault(tensor.name, tensor)
            if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                raise ValueError(f"graph {name}: {tensor.name} has another type or shape than in an earlier stage")
        for tensor in graph.outputs:
            if tensor.name in computed:
                raise ValueError(f"graph {name}: an earlier stage computes {tensor.name}, too")
            if tensor.name in inner and tensor.shape[:2] != ("B", "T"):
                raise ValueError(f"graph {name}: what later stages read, {tensor.name}, has not a row for each token")
            computed[tensor.name] = tensor


def _check_signature(name: str, graph: GraphSpec, *, static: bool) -> None:
    if len(graph.inputs) + len(graph.outputs) + len(graph.states) > _MOST_GRAPH_TENSORS:
        raise ValueError(f"graph {name} has too many tensors")
    tensors: Sequence[TensorSpec | StateSpec]
    for what, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs), ("states", graph.states)):
        names = [tensor.name for tensor in tensors]
        if len(set(names)) < len(names):
            raise ValueError(f"graph {name}: {what} has a name twice")
    everything: Sequence[TensorSpec | StateSpec] = (*graph.inputs, *graph.outputs, *graph.states)
    for tensor in everything:
        unknown = [dim for dim in tensor.shape if isinstance(dim, str) and (static or dim not in DIMS)]
        if unknown:
            raise ValueError(f"graph {name}, tensor {tensor.name}: unknown dim {unknown[0]}")
        if len(tensor.shape) > _MOST_DIMS or not all(1 <= dim <= _LARGEST_DIM for dim in tensor.shape if isinstance(dim, int)):
            raise ValueError(f"graph {name}, tensor {tensor.name}: a dim is outside 1 to {_LARGEST_DIM}")
    ids = next((tensor for tensor in graph.inputs if tensor.name == "input_ids"), None)
    if ids is None or len(ids.shape) != 2 or (not static and ids.shape != ("B", "T")) or (static and ids.shape[0] != 1):
        raise ValueError(f"graph {name}: input_ids has not the shape of a batch of tokens")


def _check_states(manifest: Manifest, name: str, graph: GraphSpec) -> None:
    inputs, outputs = {t.name: t for t in graph.inputs}, {t.name: t for t in graph.outputs}
    owned = set()
    for state in graph.states:
        if state.name not in inputs or state.after not in outputs:
            raise ValueError(f"graph {name}: state {state.name} is not an input with an output {state.after}")
        before, after = inputs[state.name], outputs[state.after]
        # A call reads P pending tokens and leaves T.
        left = tuple("P" if dim == "T" and "P" in state.shape else dim for dim in after.shape)
        if (before.dtype, before.shape) != (state.dtype, state.shape) or (after.dtype, left) != (state.dtype, state.shape):
            raise ValueError(f"graph {name}: state {state.name} has not the type and shape of its input and output")
        if state.grows != state.name.endswith((".k_cache", ".v_cache")):
            raise ValueError(f"graph {name}: state {state.name} is wrong about whether it grows")
        if not state.in_place and any(isinstance(dim, str) for dim in state.shape):
            raise ValueError(f"graph {name}: state {state.name} is not written in place")
        _check_state_shape(manifest, name, state)
        owned |= {state.name, state.name + READ_AGAIN, state.after}
    if len({state.after for state in graph.states}) < len(graph.states):
        raise ValueError(f"graph {name}: two states have one output")
    strange = sorted((inputs.keys() - _INPUTS - owned) | (outputs.keys() - _OUTPUTS - owned))
    if strange:
        raise ValueError(f"graph {name}: {strange[0]} is no state, control or result")
    if sum(inputs.keys() >= set(names) for names in _LENGTHS) != 1:
        raise ValueError(f"graph {name}: the lengths of sequences are neither {' nor '.join(' and '.join(names) for names in _LENGTHS)}")
    for tensor in graph.inputs:
        state_of = tensor.name.removesuffix(READ_AGAIN)
        if tensor.name.endswith(READ_AGAIN) and (tensor.dtype, tensor.shape) != (inputs[state_of].dtype, inputs[state_of].shape):
            raise ValueError(f"graph {name}: {tensor.name} has not the type and shape of its state")


def _check_state_shape(manifest: Manifest, name: str, state: StateSpec) -> None:
    """States have the number of elements that the model gives them, in whatever order their kernels want."""
    model, kind = manifest.model, state.name.rsplit(".", 1)[-1]
    size = model.get
    per_sequence = prod(dim for dim in state.shape[1:] if isinstance(dim, int))
    if state.grows and len(state.shape) != 4:
        raise ValueError(f"graph {name}: cache {state.name} has not four dims")
    expected: tuple[object, ...] | None = None
    if kind == "recurrent":
        expected = size("linear_num_value_heads"), size("linear_key_head_dim"), size("linear_value_head_dim")
    elif state.grows:
        slots = state.shape[2] if isinstance(state.shape[2], int) else 1
        expected = size("num_key_value_heads"), _cache_width(state, size("head_dim")), slots
    if expected is not None and all(type(factor) is int for factor in expected) and per_sequence != prod(map(int, expected)):  # type: ignore[arg-type]
        raise ValueError(f"graph {name}: state {state.name} has not the size that the model gives it")


def _cache_width(state: StateSpec, head_dim: object) -> object:
    """Elements of a row of a cache of this type."""
    if state.dtype not in BY_ELEMENT:
        raise ValueError(f"{state.name} is of {state.dtype}, in which there are no caches")
    return BY_ELEMENT[state.dtype].width(head_dim) if isinstance(head_dim, int) else head_dim


def _check_shapes(manifest: Manifest, name: str, graph: GraphSpec) -> None:
    """Results and tables against the model."""
    model, head = manifest.model, name.startswith("mtp")
    drafted = manifest.speculation.draft_vocab if manifest.speculation is not None else 0
    last: dict[str, object] = {
        "logits": drafted if head else model["vocab_size"],
        "hidden": model.get("hidden_size"),
        "hidden_out": model.get("hidden_size"),
        FEATURES: model.get("hidden_size"),
        "cos": len(manifest.rotary.inv_freq),
        "sin": len(manifest.rotary.inv_freq),
    }
    for tensor in (*graph.inputs, *graph.outputs):
        wanted = last.get(tensor.name)
        if isinstance(wanted, int) and (not tensor.shape or tensor.shape[-1] != wanted):
            raise ValueError(f"graph {name}: the last dim of {tensor.name} is not {wanted}")
    outputs = {tensor.name for tensor in graph.outputs}
    if name == "decoder" and "logits" not in outputs:
        raise ValueError("graph decoder has no logits")
    if ("top_logits" in outputs) != ("top_ids" in outputs):
        raise ValueError(f"graph {name}: top_logits and top_ids do not come together")


def _check_static(manifest: Manifest) -> None:
    """Slots of the caches and tables are the same everywhere, and hold the context."""
    slots: dict[str, int] = {}
    for name, graph in manifest.graphs.items():
        for state in graph.states:
            if state.grows:
                slots[f"graph {name}, {state.name}"] = int(state.shape[2])
        for tensor in graph.inputs:
            if tensor.name in ("cos", "sin"):
                slots[f"graph {name}, {tensor.name}"] = int(tensor.shape[0])
    if len(set(slots.values())) > 1:
        raise ValueError(
            f"the slots of {' and '.join(sorted(slots, key=lambda key: slots[key])[:: len(slots) - 1])} are not the same number"
        )
    if slots and manifest.max_context > min(slots.values()):
        raise ValueError("max_context is larger than the slots of the caches")
    graphs = {name: graph for name, graph in manifest.graphs.items() if not is_tower(name)}
    tokens = {name: next(int(t.shape[1]) for t in graph.inputs if t.name == "input_ids") for name, graph in graphs.items()}
    if slots and max(tokens.values()) > min(slots.values()):
        raise ValueError("a graph reads more tokens than the caches have slots")
    if tokens["decoder"] != 1 or tokens.get("mtp", 1) != 1:
        raise ValueError("graphs of one step do not read one token")
    draft = manifest.speculation.max_draft if manifest.speculation is not None else 0
    if tokens.get("verify", 1) != draft + 1:
        raise ValueError("speculation.max_draft and the tokens of graph verify do not fit")
