"""Which routed experts of a bundle stay in host memory where a GPU has too little, and whether that is worth it.

A step reads of each layer the experts that its router selects, K of E. Those in host memory come over the bus, which takes their bytes by
its rate. The CPU alone would read all weights of a step from memory. What the GPU reads from its own memory is left out: that is ten to a
hundred times as fast as the bus.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwen_export.bundle_contract import STEP
from qwen_export.errors import BundleError, ParameterError
from qwen_export.manifest import GraphSpec, Manifest, WeightSpec
from qwen_export.runtimes.backends.compatibility import state_bytes
from qwen_export.runtimes.backends.stage_memory import GPU_WORKSPACE, free_on
from qwen_export.runtimes.memory import memory_rates
from qwen_export.runtimes.memory.device import Device
from qwen_export.runtimes.memory.device_weights import Place, place_of
from qwen_export.runtimes.memory.mapped_weights import weight_bytes

_EMBEDDING = "embed_tokens."


def binds_weights(manifest: Manifest) -> bool:
    return any(graph.bound for graph in manifest.graphs.values())


def experts_on_host(manifest: Manifest, device: Device, budget: int | None, context: int) -> frozenset[Place]:
    """The experts that do not fit `budget` bytes of weights on the GPU; None for what is free beside states and caches of one sequence of
    `context` tokens. The last layers' stay out first.

    Raises ParameterError where even the other weights do not fit, and BundleError where a step would be slower than on the CPU alone."""
    if device.is_host:
        return frozenset()
    others = sum(weight_bytes(weight) for graph in manifest.graphs.values() for weight in _unbound(graph))
    if budget is None:
        free = free_on(device)
        budget = (free or 0) - state_bytes(manifest, context) - GPU_WORKSPACE
    room = budget - others
    if room < 0:
        raise ParameterError(
            "the GPU does not hold the weights that cannot stay in host memory",
            parameter="weight_budget",
            got=f"{budget / 1e9:.2f} GB",
            expected=f"at least {others / 1e9:.2f} GB",
            fix="Raise {weight_budget}, lower {max_context}, or end other programs that use the GPU.",
        )
    # The draft head's first: it runs several times in a round.
    graphs = sorted(manifest.graphs.items(), key=lambda item: item[0] == STEP)
    out: dict[Place, int] = {}
    for _, graph in graphs:
        for weight in _bound(graph):
            size = weight_bytes(weight)
            if out or size > room:
                out[place_of(weight)] = size
            else:
                room -= size
    if out:
        _require_gain(manifest, device, sum(out.values()))
    return frozenset(out)


def _require_gain(manifest: Manifest, device: Device, on_host: int) -> None:
    """Raise BundleError where steps over `on_host` bytes of experts in host memory take longer than the CPU's."""
    graph, model = manifest.graphs[STEP], manifest.model
    share = model["num_experts_per_tok"] / model["num_experts"]
    experts = sum(weight_bytes(weight) for weight in _bound(graph)) * share
    read = experts + sum(weight_bytes(weight) for weight in _unbound(graph) if not weight.name.startswith(_EMBEDDING))
    link, host = memory_rates.link_rate(device.index), memory_rates.host_rate()
    over_bus, alone = on_host * share / link, read / host
    if over_bus > alone:
        raise BundleError(
            "with so many experts in host memory the GPU would be slower than the CPU alone",
            got=f"{1e3 * over_bus:.1f} ms per token for {on_host * share / 1e9:.2f} GB over the bus at {link / 1e9:.0f} GB/s",
            expected=f"at most the {1e3 * alone:.1f} ms in which the CPU reads {read / 1e9:.2f} GB at {host / 1e9:.0f} GB/s",
            fix="Raise {weight_budget}, lower {max_context}, or build for {device} cpu.",
        )


def _bound(graph: GraphSpec) -> Iterator[WeightSpec]:
    named = {weight.name: weight for weight in graph.weights}
    return (named[name] for name in graph.bound)


def _unbound(graph: GraphSpec) -> Iterator[WeightSpec]:
    return (weight for weight in graph.weights if weight.name not in graph.bound)
