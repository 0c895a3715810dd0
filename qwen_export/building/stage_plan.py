"""Where a decoder is cut into stages: runs of layers of balanced bytes, each for a device of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen_export.building.weight_sizes import WeightSize
from qwen_export.errors import ParameterError, UnsupportedError
from qwen_export.graphs.call_sizes import DECODER, HEAD, GraphPlan
from qwen_export.graphs.config import TextConfig


def plan_stages(stages: int, config: TextConfig, sizes: Mapping[str, WeightSize], graphs: Mapping[str, GraphPlan]) -> tuple[int, ...]:
    """The first layer of each stage. Raises ParameterError for a number that the model does not have layers for, and UnsupportedError
    where graphs have fixed sizes."""
    if stages == 1:
        return (0,)
    layers = len(config.layer_types)
    if not 1 <= stages <= layers:
        raise ParameterError(
            "the number of stages is out of range", parameter="stages", got=stages, expected=f"1 to {layers} layers", fix="Change {stages}."
        )
    if graphs.get(DECODER) != GraphPlan(DECODER):
        raise UnsupportedError(
            "graphs of fixed sizes are not cut into stages",
            got=f"{stages} stages",
            fix="Build for target onnxruntime, or leave {stages} out.",
        )
    costs, first, last = stage_costs(config, sizes, head=HEAD in graphs)
    return tuple(balanced_starts(costs, first, last, stages))


def stage_costs(config: TextConfig, sizes: Mapping[str, WeightSize], *, head: bool) -> tuple[list[int], int, int]:
    """Bytes of each layer, of what stands before the first, and of what stands behind the last: norm, head and draft head. A head that is
    the embedding is stored on both sides."""
    costs = [0] * len(config.layer_types)
    first = last = 0
    for name, (_, nbytes) in sizes.items():
        parts = name.split(".")
        if parts[0] == "layers":
            costs[int(parts[1])] += nbytes
        elif parts[0] == "embed_tokens":
            first += nbytes
            last += nbytes if config.tie_word_embeddings or head else 0
        else:
            last += nbytes
    return costs, first, last


def balanced_starts(layers: Sequence[int], first: int, last: int, stages: int) -> list[int]:
    """The first layer of each of `stages` stages, so that the largest stage is as small as it can be. `layers`: the cost of each layer;
    `first` and `last`: what the first and the last stage have besides, such as embedding and head."""
    count = len(layers)
    if not 1 <= stages <= count:
        raise AssertionError(f"{count} layers cannot be cut into {stages} stages")
    before = [0]
    for nbytes in layers:
        before.append(before[-1] + nbytes)

    def cost(start: int, stop: int) -> int:
        return before[stop] - before[start] + first * (start == 0) + last * (stop == count)

    # best[n][stop]: the largest stage of the best cut of the first `stop` layers into n stages, and where its last stage starts.
    best = [{stop: (cost(0, stop), 0) for stop in range(1, count + 1)}]
    for n in range(1, stages):
        row = {}
        for stop in range(n + 1, count + 1):
            row[stop] = min((max(best[-1][start][0], cost(start, stop)), start) for start in range(n, stop))
        best.append(row)
    starts, stop = [], count
    for row in reversed(best):
        stop = row[stop][1]
        starts.append(stop)
    return starts[::-1]
