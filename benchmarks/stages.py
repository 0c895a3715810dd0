"""One GPU beside several that each have a stage of the model: steps of one stream, a long prompt, streams of an engine.

    python -m benchmarks.stages --sizes 9B --precision bf16 --devices 0,1
    python -m benchmarks.stages --sizes tiny --device cpu --precision fp32 --prompt-tokens 512 --streams 4 --new-tokens 16   # a trial

Both bundles are built from one random checkpoint and loaded into one process; the rounds alternate. `one` is the whole model on the first
of the devices. Ratios are medians over rounds, of rates of the same round. The 9B in bf16 takes 54 GB of disk.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from qwen_export import build
from qwen_export.runtimes import Model, load
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.serving.streams_benchmark import through_engine
from tests.support.family import FAMILY, tiny_config
from tests.support.synthesize import synthesize

SIZES = FAMILY | {"tiny": tiny_config(vision=False, layers=8)}
SHORT = 128
"""Tokens before the steps that are timed, and in the prompt of each stream."""


def config_of(size: str, layers: int | None) -> dict[str, Any]:
    config = copy.deepcopy(SIZES[size])
    text = config.get("text_config", config)
    if layers is not None:
        text |= {"num_hidden_layers": layers, "layer_types": text["layer_types"][:layers]}
    return config


def made(size: str, arguments: argparse.Namespace) -> list[Path]:
    """The bundle of one graph, and that in stages."""
    bundles = []
    checkpoint = arguments.work / f"{size}-checkpoint"
    for stages in (1, arguments.stages):
        bundle = arguments.work / f"{size}-{arguments.precision}-{stages}"
        if not bundle.exists():
            if not checkpoint.exists():
                synthesize(config_of(size, arguments.layers), checkpoint, with_vision=False, with_mtp=False)
            started = time.perf_counter()
            build(checkpoint, bundle, device=arguments.device, precision=arguments.precision, mtp=False, stages=stages)
            print(f"built {bundle.name} in {time.perf_counter() - started:.0f} s", flush=True)
        bundles.append(bundle)
    return bundles


def opened(bundle: Path, devices: Sequence[int], arguments: argparse.Namespace) -> Model:
    started = time.perf_counter()
    on = {"devices": list(devices)} if arguments.device == "cuda" else {}
    context = max(arguments.prompt_tokens, SHORT + 8 * arguments.new_tokens) + 64
    model = load(bundle, max_context=context, speculate="off", **on)
    print(f"loaded {bundle.name} in {time.perf_counter() - started:.1f} s", flush=True)
    return model


def alternate(name: str, runs: Sequence[Callable[[], float]], rounds: int, unit: str = "tok/s") -> None:
    """A line of the table: the rates of `runs` in turns, behind a round that binds and records."""
    seen = [[run() for run in runs] for _ in range(rounds + 1)][1:]
    one, several = (median(row[column] for row in seen) for column in (0, 1))
    ratio = median(row[1] / row[0] for row in seen)
    spread = f"{min(row[1] / row[0] for row in seen):.2f}-{max(row[1] / row[0] for row in seen):.2f}"
    print(f"{name:24} {one:10.1f} {several:10.1f} {unit}  {ratio:5.2f}  ({spread})", flush=True)


def compare(models: Sequence[Model], arguments: argparse.Namespace) -> None:
    chance, vocabulary = np.random.default_rng(0), models[0].manifest.model["vocab_size"]
    prompt = chance.integers(0, vocabulary, arguments.prompt_tokens).tolist()
    decoders = [model.decoder() for model in models]

    def decode(number: int) -> float:
        decoder = decoders[number]
        decoder.reset()
        token = int(decoder.prefill(prompt[:SHORT]).argmax())
        started = time.perf_counter()
        for _ in range(arguments.new_tokens):
            token = int(decoder.step([token])[0].argmax())
        return arguments.new_tokens / (time.perf_counter() - started)

    def prefill(number: int) -> float:
        decoders[number].reset()
        started = time.perf_counter()
        decoders[number].prefill(prompt)
        return len(prompt) / (time.perf_counter() - started)

    print(f"{'':24} {'one':>10} {'stages':>10}        ratio  (of the rounds)")
    alternate("decode, 1 stream", [lambda: decode(0), lambda: decode(1)], arguments.rounds)
    alternate(f"prefill {len(prompt)}", [lambda: prefill(0), lambda: prefill(1)], arguments.rounds)
    last = []
    for decoder in decoders:
        decoder.reset()
        last.append(np.array(decoder.prefill(prompt)))
    print(f"largest difference of the logits of that prompt: {np.abs(last[0] - last[1]).max():.3g} of {np.abs(last[0]).max():.3g}")
    decoders.clear()
    for streams in arguments.streams:
        prompts = chance.integers(0, vocabulary, (streams, SHORT)).tolist()
        engines = [Engine.of(model, streams, prefix_memory=0) for model in models]
        try:
            runs = [lambda engine=engine, prompts=prompts: through_engine(engine, prompts, arguments.new_tokens)[0] for engine in engines]
            alternate(f"engine, {streams} streams", runs, arguments.rounds)
        finally:
            for engine in engines:
                engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="9B", help=", ".join(SIZES))
    parser.add_argument("--layers", type=int, help="fewer than the size has")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--devices", default="0,1", help="of the stages; one that has several may be named once only")
    parser.add_argument("--stages", type=int, help="default: one per device")
    parser.add_argument("--prompt-tokens", type=int, default=8192)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--streams", default="32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(".cache/stages"))
    parser.add_argument("--remove", action="store_true", help="delete checkpoint and bundles of a size when it is measured")
    arguments = parser.parse_args()
    devices = [int(part) for part in arguments.devices.split(",")]
    arguments.stages = arguments.stages or len(devices)
    arguments.streams = [int(part) for part in arguments.streams.split(",")]
    arguments.work.mkdir(parents=True, exist_ok=True)
    for size in arguments.sizes.split(","):
        whole, cut = made(size, arguments)
        print(f"\n{size} {arguments.precision}, {arguments.stages} stages on {arguments.device} {arguments.devices}")
        with opened(whole, devices[:1], arguments) as one, opened(cut, devices, arguments) as several:
            compare([one, several], arguments)
        if arguments.remove:
            for path in arguments.work.glob(f"{size}-*"):
                shutil.rmtree(path)


if __name__ == "__main__":
    main()
