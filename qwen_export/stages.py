"""Graphs in stages: a graph that is cut into consecutive ones is listed as NAME.0, NAME.1, ... in a manifest. Together they are the graph
NAME, and what they hand on to each other are its *links*. Imports nothing but the manifest's types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qwen_export.manifest_types import GraphSpec, StateSpec, TensorSpec


def stage_name(graph: str, number: int) -> str:
    """`decoder.1`."""
    return f"{graph}.{number}"


def stage_weights(number: int) -> str:
    """The file with the weights of a stage."""
    return f"model.{number}.weights"


def stage_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of a manifest's graphs by the graph that they are stages of: {"decoder": ["decoder.0", "decoder.1"], "mtp": ["mtp"]}."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    for group in groups.values():
        group.sort(key=lambda name: int(name.partition(".")[2] or 0))
    return groups


def links(stages: Sequence[GraphSpec]) -> dict[str, int]:
    """Outputs of a stage that later ones read: name and number of the stage that computes it."""
    read = {tensor.name for stage in stages for tensor in stage.inputs}
    return {tensor.name: number for number, stage in enumerate(stages) for tensor in stage.outputs if tensor.name in read}


def joined(stages: Sequence[GraphSpec]) -> GraphSpec:
    """The signature of all stages together, without links. Inputs that several stages read are named once."""
    inner = links(stages)
    inputs: dict[str, TensorSpec] = {}
    for stage in stages:
        for tensor in stage.inputs:
            if tensor.name not in inner:
                inputs.setdefault(tensor.name, tensor)
    outputs = [tensor for stage in stages for tensor in stage.outputs if tensor.name not in inner]
    states: list[StateSpec] = [state for stage in stages for state in stage.states]
    return GraphSpec(stages[0].file, tuple(inputs.values()), tuple(outputs), tuple(states))


def joined_graphs(graphs: Mapping[str, GraphSpec]) -> dict[str, GraphSpec]:
    """The graphs of a manifest, those in stages joined."""
    groups = stage_groups(graphs)
    return {role: graphs[role] if names == [role] else joined([graphs[name] for name in names]) for role, names in groups.items()}
