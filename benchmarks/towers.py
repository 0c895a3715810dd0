"""The vision tower alone, beside the time that its floating-point operations would take: of one picture of each side.

    python -m benchmarks.towers --sizes 4B --precisions bf16,fp16 --sides 512,1024,2048,4096

The tower has its released shape, over a decoder of four layers with random weights. `call`: with pixels copied to the device and features
copied back; `graph`: the call with both where they are, which the ratio is of. Memory is what the device has less of after the first
call, which with ONNX Runtime's arena is the most that was in use.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from statistics import median

import numpy as np

from qwen_export import build
from qwen_export.bundle_contract import VISION_INPUTS
from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.stop_signal import StopSignal
from qwen_export.runtimes.memory.cuda_driver import memory_info
from qwen_export.runtimes.vision.picture import open_picture
from qwen_export.runtimes.vision.picture_size import Bounds
from qwen_export.runtimes.vision.tower_calls import BoundCall, Features, FreeTower, Inputs, TowerCalls
from tests.support.family import FAMILY
from tests.support.synthesize import synthesize

PEAK = 400e12
"""FLOP/s that the tower is held against: half of what one H200 gives a large product of 16-bit matrices."""


class Recorder:
    """Keeps what a tower is called with."""

    def __init__(self, tower: TowerCalls) -> None:
        self.tower, self.inputs = tower, dict[str, np.ndarray]()
        self.largest, self.at_once = tower.largest, tower.at_once

    def run(self, inputs: Inputs, stop: StopSignal) -> Features:
        self.inputs = dict(inputs)
        return self.tower.run(inputs, stop)


def graph_seconds(tower: TowerCalls, inputs: Inputs, rounds: int) -> float:
    """The median of a call whose inputs and outputs stay on the device."""
    if not isinstance(tower, FreeTower):
        raise TypeError("the tower has graphs of fixed sizes")
    [output], times = tower.session.spec.outputs, []
    bound = BoundCall(tower.session, inputs, {output.name: (*inputs[VISION_INPUTS[0]].shape[:2], int(output.shape[-1]))})
    bound.call.run()
    for _ in range(rounds):
        began = time.perf_counter()
        bound.call.run()
        times.append(time.perf_counter() - began)
    return median(times)


def flops(vision: dict[str, int], patches: int) -> float:
    """Of the products of a tower and of its attention, over all patches of one slice."""
    d, inner, merged = vision["hidden_size"], vision["intermediate_size"], vision["spatial_merge_size"] ** 2
    row = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    block = 2 * (4 * d * d + 2 * d * inner) + 4 * patches * d
    merger = 2 * merged * d * (merged * d + vision["out_hidden_size"]) / merged
    return patches * (2 * row * d + vision["depth"] * block + merger)


def measure(size: str, precision: str, sides: list[int], rounds: int, work: Path) -> None:
    config = copy.deepcopy(FAMILY[size])
    text = config["text_config"]
    text |= {"num_hidden_layers": 4, "layer_types": text["layer_types"][:4]}
    checkpoint, bundle = work / f"{size}-sees", work / f"{size}-sees-{precision}"
    if not checkpoint.exists():
        synthesize(config, checkpoint, with_mtp=False)
    if not bundle.exists():
        build(checkpoint, bundle, device="cuda", precision=precision, mtp=False, vision=True)
    with load(bundle, max_context=1024, speculate="off") as model:
        assert model.sight is not None
        encoder = model.sight.encoder
        recorder = Recorder(encoder.tower)
        encoder.tower = recorder
        for side in sides:
            pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
            picture, free = open_picture(pixels, model.sight.spec, bounds=Bounds(1, side * side)), memory_info()[0]
            began = time.perf_counter()
            encoder.features(picture)
            first, used = time.perf_counter() - began, free - memory_info()[0]
            calls = []
            for _ in range(rounds):
                began = time.perf_counter()
                recorder.tower.run(recorder.inputs, StopSignal())
                calls.append(time.perf_counter() - began)
            graph = graph_seconds(recorder.tower, recorder.inputs, rounds)
            limit = flops(config["vision_config"], (side // 16) ** 2) / PEAK
            print(
                f"{size} {precision} {side}x{side}: first {1000 * first:.1f} ms, call {1000 * median(calls):.2f} ms, "
                f"graph {1000 * graph:.2f} ms, at 400 TFLOP/s {1000 * limit:.2f} ms, {graph / limit:.2f}x; {used >> 20} MB",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4B")
    parser.add_argument("--precisions", default="bf16")
    parser.add_argument("--sides", default="512,1024,2048,4096")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--work", type=Path, default=Path(".cache/towers"))
    given = parser.parse_args()
    for size in given.sizes.split(","):
        for precision in given.precisions.split(","):
            measure(size, precision, [int(side) for side in given.sides.split(",")], given.rounds, given.work)


if __name__ == "__main__":
    main()
