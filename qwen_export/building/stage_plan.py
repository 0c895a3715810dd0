"""Where a decoder is cut into stages: runs of layers of balanced bytes, each for a device of its own; and into how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen_export.building.sequence_bytes import cache_bytes_per_token, layer_bytes
from qwen_export.building.weight_sizes import WeightSize
from qwen_export.cache_formats import CacheFormat
from qwen_export.errors import BundleError, ParameterError, UnsupportedError
from qwen_export.graphs.call_sizes import DECODER, GraphPlan
from qwen_export.graphs.config import TextConfig
from qwen_export.runtimes.backends.stage_memory import GPU_WORKSPACE
from qwen_export.runtimes.memory.cuda_driver import device_count, total_memory


@dataclass(frozen=True)
class Stage:
    """Consecutive layers, and bytes of their weights and of states and caches of one sequence. The first has the embedding, the last what
    stands behind the layers: head, draft head, vision tower."""

    first: int
    layers: int
    weight_bytes: int
    sequence_bytes: int

    @property
    def gpu_bytes(self) -> int:
        """Memory that a GPU needs for it."""
        return self.weight_bytes + self.sequence_bytes + GPU_WORKSPACE

    @property
    def facts(self) -> dict[str, int]:
        """For reports."""
        last = self.first + self.layers - 1
        return {"first_layer": self.first, "last_layer": last, "weight_bytes": self.weight_bytes, "gpu_bytes": self.gpu_bytes}


@dataclass(frozen=True)
class StageCosts:
    """Bytes of weights and of one sequence with a full context: of each layer, of what stands before the first, and behind the last. A
    head that is the embedding is stored on both sides."""

    weights: Sequence[int]
    sequence: Sequence[int]
    first: int
    last: int
    last_sequence: int

    @classmethod
    def of(
        cls, config: TextConfig, sizes: Mapping[str, WeightSize], context: int, size: int, caches: CacheFormat, *, head: bool
    ) -> StageCosts:
        """`size`: bytes of an element of histories; `head`: with the draft head."""
        weights, first, last = [0] * len(config.layer_types), 0, 0
        for name, (_, nbytes) in sizes.items():
            parts = name.split(".")
            if parts[0] == "layers":
                weights[int(parts[1])] += nbytes
            elif parts[0] == "embed_tokens":
                first += nbytes
                last += nbytes if config.tie_word_embeddings or head else 0
            else:
                last += nbytes
        sequence = [layer_bytes(config, kind, size, caches, context) for kind in config.layer_types]
        drafts = cache_bytes_per_token(config, caches, head=head) - cache_bytes_per_token(config, caches)
        return cls(weights, sequence, first, last, drafts * context)

    def cut(self, count: int) -> tuple[Stage, ...]:
        """`count` stages, the largest as small as it can be."""
        layers = [weights + sequence for weights, sequence in zip(self.weights, self.sequence, strict=True)]
        starts = balanced_starts(layers, self.first, self.last + self.last_sequence, count)
        stages = []
        for start, stop in zip(starts, [*starts[1:], len(layers)], strict=True):
            weights = sum(self.weights[start:stop]) + self.first * (start == 0) + self.last * (stop == len(layers))
            sequence = sum(self.sequence[start:stop]) + self.last_sequence * (stop == len(layers))
            stages.append(Stage(start, stop - start, weights, sequence))
        return tuple(stages)

    def fitting(self, memory: int) -> tuple[Stage, ...] | None:
        """As few stages as GPUs of `memory` bytes hold, None where a single layer is too large for one."""
        for count in range(1, len(self.weights) + 1):
            stages = self.cut(count)
            if max(stage.gpu_bytes for stage in stages) <= memory:
                return stages
        return None


def plan_stages(stages: int | None, costs: StageCosts, graphs: Mapping[str, GraphPlan], memory: int | None) -> tuple[Stage, ...]:
    """The stages of a decoder. None: as many as GPUs of `memory` bytes need, one where that is not known, or where graphs have fixed sizes.
    Raises ParameterError for a number that the model does not have layers for, and UnsupportedError for several of fixed sizes."""
    free = graphs.get(DECODER) == GraphPlan(DECODER)
    if stages is None:
        return (costs.fitting(memory) if memory is not None and free else None) or costs.cut(1)
    layers = len(costs.weights)
    if not 1 <= stages <= layers:
        raise ParameterError(
            "the number of stages is out of range", parameter="stages", got=stages, expected=f"1 to {layers} layers", fix="Change {stages}."
        )
    if stages > 1 and not free:
        raise UnsupportedError(
            "graphs of fixed sizes are not cut into stages",
            got=f"{stages} stages",
            fix="Build for target onnxruntime, or leave {stages} out.",
        )
    return costs.cut(stages)


def present_memory() -> int | None:
    """Bytes of the smallest GPU of this machine, None where it has none."""
    try:
        return min((total_memory(number) for number in range(device_count())), default=None)
    except BundleError:
        return None


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
