"""The kernels of a decode step on a GPU: how often each runs in a step, for how long, and what it adds to the step.

    python benchmarks/step_kernels.py BUNDLE... [--streams 1,64] [--order]

Needs a torch with CUDA, whose profiler records the kernels of ONNX Runtime in the same process, also those of recorded graphs. Kernels
overlap with the one before them; `adds` is the time by which a kernel ends later than all before it, `gap` the time before it in which
nothing ran. The recording itself makes a step some 10 % longer.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median, mode
from typing import Any

import numpy as np
import torch  # before ONNX Runtime, which then takes its CUDA
from torch.profiler import ProfilerActivity, profile

from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.decoder import Decoder

STEPS = 24
_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
Event = dict[str, Any]


def short(name: str) -> str:
    """A kernel's name without its arguments and the namespaces that all have."""
    name, depth = re.sub(r"^void |\(anonymous namespace\)::|<unnamed>::|qwen::", "", name), 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:place].strip()
    return name


def steps(decoder: Decoder, tokens: list[int], count: int) -> float:
    """Microseconds of a step of so many sequences."""
    began = time.perf_counter()
    for _ in range(count):
        decoder.step(tokens)[0].argmax()
    return (time.perf_counter() - began) / count * 1e6


def recorded(decoder: Decoder, tokens: list[int]) -> list[Event]:
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        steps(decoder, tokens, STEPS)
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        found.export_chrome_trace(file.name)
        events: list[Event] = json.loads(Path(file.name).read_text())["traceEvents"]
    return sorted((event for event in events if event.get("cat") in _KINDS), key=lambda event: event["ts"])


def by_step(events: list[Event]) -> list[list[Event]]:
    """Between steps is the host: the longest gaps part them. Steps of another number of events than most are left out."""
    gaps, end = [], events[0]["ts"]
    for place, event in enumerate(events):
        gaps.append((event["ts"] - end, place))
        end = max(end, event["ts"] + event["dur"])
    cuts = [0, *sorted(place for _, place in sorted(gaps)[-(STEPS - 1) :]), len(events)]
    found = [events[a:b] for a, b in pairwise(cuts)]
    usual = mode(len(step) for step in found)
    return [step for step in found if len(step) == usual]


def table(found: list[list[Event]]) -> None:
    lengths, adds, gaps = defaultdict[str, list[float]](list), defaultdict[str, float](float), defaultdict[str, float](float)
    spans = []
    for step in found:
        end = step[0]["ts"]
        for event in step:
            name, start, stop = short(event["name"]), event["ts"], event["ts"] + event["dur"]
            lengths[name].append(event["dur"])
            gaps[name] += max(0.0, start - end)
            adds[name] += max(0.0, stop - max(start, end))
            end = max(end, stop)
        spans.append(end - step[0]["ts"])
    count = len(found)
    print(f"{count} steps, {median(spans):.0f} us each; nothing runs for {sum(gaps.values()) / count:.0f} of them\n")
    print("| kernel | in a step | mean, us | sum, us | adds, us | gap, us |\n|---|---|---|---|---|---|")
    for name in sorted(adds, key=lambda name: -adds[name]):
        times = lengths[name]
        columns = (np.mean(times), sum(times) / count, adds[name] / count, gaps[name] / count)
        print(f"| {name} | {len(times) / count:.0f} | " + " | ".join(f"{value:.1f}" for value in columns) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--order", action="store_true", help="also the kernels of one step one after the other")
    parser.add_argument("--streams", default="1", help="sequences of a step, e.g. 1,64")
    given = parser.parse_args()
    with profile(activities=[ProfilerActivity.CUDA]):  # so that graphs recorded from here on can be seen into
        torch.zeros(1, device="cuda")
    for bundle in given.bundles:
        for streams in map(int, given.streams.split(",")):
            report(bundle, streams, given.order)


def report(bundle: Path, streams: int, order: bool) -> None:
    with load(bundle, max_context=2048, speculate="off") as model:
        decoder = model.decoder(streams)
        prompt = np.random.default_rng(0).integers(0, model.manifest.model["vocab_size"], 128).tolist()
        tokens = [int(decoder.prefill(prompt, slot).argmax()) for slot in range(streams)]
        steps(decoder, tokens, 30)
        quickest = min(steps(decoder, tokens, 60) for _ in range(3))
        print(f"\n{bundle.name}: a step of {streams} takes {quickest:.0f} us when nothing is recorded")
        found = by_step(recorded(decoder, tokens))
    table(found)
    if order:
        first = found[-1][0]["ts"]
        for event in found[-1]:
            print(f"{event['ts'] - first:9.1f} {event['dur']:8.2f} {event.get('args', {}).get('grid')} {short(event['name'])}")


if __name__ == "__main__":
    main()
