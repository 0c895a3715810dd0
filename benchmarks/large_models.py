"""Models that are larger than disk and time allow to build whole: all layers of the real shapes, with the routed experts stored once.

    python -m benchmarks.large_models 122B-A10B                                  # one GPU, int4
    python -m benchmarks.large_models 397B-A17B --devices 0,1                    # two stages on two GPUs, int4
    python -m benchmarks.large_models 397B-A17B --real --layers 4 --device cuda  # a real build of 4 layers: seconds and bytes per layer
    python -m benchmarks.large_models tiny --device cpu --layers 4               # a trial

What is real and what is not: shapes, layers, graphs, kernels, and all weights but the experts are those of a build of a random checkpoint,
whose values are generated where a file would be read. The routed experts of all layers of a stage are those of its first layer: one region
of the file, to which all of them point. Each layer has a router of its own. A GPU still gets a copy per layer, so its memory and what a
step reads are those of the whole model. Load time is not that of reading the whole model from a disk: the file is small, and the system
keeps it in memory. With `--real` nothing is shared.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.build_memory import generate_values, sparse_checkpoint
from benchmarks.measured_process import peak_rss_mb, run_measured
from benchmarks.stages import SHORT, config_of, through_engines
from qwen_export.graphs.weights.expression import StoredWeight, Weight, WeightTensor
from qwen_export.graphs.weights.weight_writer import lazy_weights
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import Model, load
from qwen_export.runtimes.memory import cuda_driver
from qwen_export.runtimes.memory.mapped_weights import weight_bytes
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.serving.streams_benchmark import through_engine
from tests.support.family import FAMILY, tiny_config

SIZES = {name: config for name, config in FAMILY.items() if "A" in name} | {"tiny": tiny_config(moe=True, vision=False, layers=8)}
_LAYER = re.compile(r"^layers\.(\d+)\.")
_EXPERTS = re.compile(r"^layers\.\d+(\.mlp\.experts\..*)$")


def share_experts(model: ir.Model) -> None:
    """The routed experts of all layers of a graph become those of its first layer; equal weights are stored once."""
    weights = lazy_weights([model])
    layers = [int(found[1]) for _, weight in weights for name in weight.stored() if (found := _LAYER.match(name))]
    first = min(layers)
    for value, weight in weights:
        if all(_EXPERTS.match(name) for name in weight.stored()) and any(True for _ in weight.stored()):
            value.const_value = WeightTensor(_moved(weight, first), value.name or "")


def _moved(part: Any, layer: int) -> Any:
    """An expression over the experts of `layer` in the place of its own."""
    if isinstance(part, StoredWeight):
        return replace(part, name=_EXPERTS.sub(rf"layers.{layer}\1", part.name))
    if isinstance(part, tuple):
        return tuple(_moved(one, layer) for one in part)
    if is_dataclass(part) and isinstance(part, Weight):
        old = {field.name: getattr(part, field.name) for field in fields(part) if field.init}
        new = {name: _moved(value, layer) for name, value in old.items()}
        return replace(part, **{name: value for name, value in new.items() if value is not old[name]})
    return part


def child(arguments: argparse.Namespace, checkpoint: Path, bundle: Path) -> None:
    """The build, in a process of its own whose memory is measured."""
    import qwen_export.building.lower_graphs as lowering
    from qwen_export import build

    generate_values()
    lower = lowering.lower

    def lower_shared(*given: Any) -> dict[str, ir.Model]:
        models = lower(*given)
        for model in models.values():
            share_experts(model)
        return models

    if not arguments.real:
        lowering.lower = lower_shared
    taken: dict[str, float] = defaultdict(float)
    written: dict[str, int] = defaultdict(int)
    last, before, writing = time.perf_counter(), 0, False

    def report(name: str, done: int, total: int) -> None:
        nonlocal last, before, writing
        now = time.perf_counter()
        found = _LAYER.match(name)
        key = "graphs" if not writing else found[1] if found else "embedding, head and norm"
        taken[key] += now - last
        written[key] += done - before if writing else 0
        last, before, writing = now, done, total > 0

    started = time.perf_counter()
    build(
        checkpoint,
        bundle,
        device=arguments.device,
        precision=arguments.precision,
        mtp=False,
        vision=False,
        max_context=arguments.max_context,
        max_memory=int(arguments.max_memory * 1e9) if arguments.max_memory else None,
        stages=arguments.stages,
        report=report,
    )
    print(f"built in {time.perf_counter() - started:.0f} s, peak RSS {peak_rss_mb():.0f} MB")
    if arguments.real:
        for key in sorted(taken, key=lambda key: (not key.isdigit(), key)):
            name = f"layer {key}" if key.isdigit() else key
            print(f"  {name:26} {taken[key]:8.1f} s  {written[key] / 1e9:8.2f} GB")
        layers = [key for key in taken if key.isdigit()]
        seconds, size = sum(taken[key] for key in layers) / len(layers), sum(written[key] for key in layers) / len(layers)
        count = SIZES[arguments.size].get("text_config", SIZES[arguments.size])["num_hidden_layers"]
        rest = sum(taken.values()) - seconds * len(layers)
        print(
            f"  a layer: {seconds:.1f} s, {size / 1e9:.2f} GB; all {count}: about {(rest + seconds * count) / 60:.0f} minutes at this rate"
        )


def describe(bundle: Path) -> None:
    """What a graph has on its device, and what its file has."""
    manifest = load_manifest(bundle)
    total = 0
    for name, graph in manifest.graphs.items():
        nbytes = sum(weight_bytes(weight) for weight in graph.weights)
        layers = {state.name.split(".")[1] for state in graph.states}
        print(f"{name}: {len(layers)} layers, weights of {nbytes / 1e9:.1f} GB")
        total += nbytes
    stored = sum(entry.size for file, entry in manifest.files.items() if file.endswith(".weights"))
    print(f"all weights {total / 1e9:.1f} GB; files of weights {stored / 1e9:.1f} GB", flush=True)


def free(devices: list[int]) -> list[int]:
    found = []
    for device in devices:
        cuda_driver.use_device(device)
        found.append(cuda_driver.memory_info()[0])
    return found


def measure(model: Model, arguments: argparse.Namespace) -> None:
    chance, vocabulary = np.random.default_rng(0), model.manifest.model["vocab_size"]
    prompt = chance.integers(0, vocabulary, arguments.prompt_tokens).tolist()
    decoder = model.decoder()
    times = []
    for _ in range(arguments.rounds + 1):
        decoder.reset()
        started = time.perf_counter()
        logits = decoder.prefill(prompt)
        times.append(time.perf_counter() - started)
    if not np.isfinite(logits).all() or logits.std() == 0:
        raise SystemExit("the logits are not finite, or all the same")
    best = median(times[1:])
    print(f"prefill {len(prompt)}: {len(prompt) / best:.0f} tok/s, the first time {times[0]:.2f} s")
    rates = []
    for _ in range(arguments.rounds + 1):
        decoder.reset()
        token = int(decoder.prefill(prompt[:SHORT]).argmax())
        started = time.perf_counter()
        for _ in range(arguments.new_tokens):
            token = int(decoder.step([token])[0].argmax())
        rates.append(arguments.new_tokens / (time.perf_counter() - started))
    print(f"decode: {median(rates[1:]):.1f} tok/s", flush=True)
    del decoder
    prompts = chance.integers(0, vocabulary, (arguments.streams, SHORT)).tolist()
    with Engine.of(model, arguments.streams, prefix_memory=0) as engine:
        rates = [through_engine(engine, prompts, arguments.new_tokens)[0] for _ in range(arguments.rounds + 1)]
    print(f"engine, {arguments.streams} streams: {median(rates[1:]):.1f} tok/s", flush=True)
    share = arguments.streams // arguments.stages
    if arguments.stages > 1 and share:
        with ExitStack() as stack:
            engines = [stack.enter_context(Engine.of(model, share, prefix_memory=0)) for _ in range(arguments.stages)]
            for engine in engines:  # what is recorded is recorded while no other thread uses the GPUs
                through_engine(engine, prompts[:share], arguments.new_tokens)
            rates = [through_engines(engines, prompts, arguments.new_tokens) for _ in range(arguments.rounds + 1)]
        print(f"{arguments.stages} engines, {share} streams each: {median(rates[1:]):.1f} tok/s together", flush=True)


def run(bundle: Path, arguments: argparse.Namespace) -> None:
    devices = [int(part) for part in arguments.devices.split(",")] if arguments.device == "cuda" else []
    before, started = free(devices), time.perf_counter()
    context = max(arguments.prompt_tokens, SHORT + 8 * arguments.new_tokens) + 64
    with load(bundle, max_context=min(context, arguments.max_context), speculate="off", devices=devices) as model:
        model.decoder().step([0])
        print(f"loaded, first step included, in {time.perf_counter() - started:.1f} s, peak RSS {peak_rss_mb() / 1024:.1f} GiB")
        for device, had, has in zip(devices, before, free(devices), strict=True):
            print(f"GPU {device}: {(had - has) / 1e9:.1f} GB taken, {has / 1e9:.1f} GB free", flush=True)
        measure(model, arguments)
        for device, had, has in zip(devices, before, free(devices), strict=True):
            print(f"GPU {device}, at the end: {(had - has) / 1e9:.1f} GB taken")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("--layers", type=int, help="fewer than the size has, at least 4")
    parser.add_argument("--real", action="store_true", help="build the layers with all their experts, and say what each takes; do not run")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--devices", default="0")
    parser.add_argument("--stages", type=int, help="default: one per device")
    parser.add_argument("--max-context", type=int, default=8192)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(".cache/large"))
    parser.add_argument("--max-memory", type=float, metavar="GB", help="of the build: an expert takes 0.1 GB while it is made")
    parser.add_argument("--keep", action="store_true", help="leave the bundle there, and take one that is there")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.stages = arguments.stages or len(arguments.devices.split(","))
    if arguments.child:
        child(arguments, *arguments.child)
        return
    config = config_of(SIZES[arguments.size], arguments.layers)
    work = arguments.work.resolve() / f"{arguments.size}-{arguments.layers or 'all'}-{arguments.stages}{'-real' * arguments.real}"
    bundle, checkpoint = work / "bundle", work / "checkpoint"
    if not bundle.exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        sparse_checkpoint(config, checkpoint)
        command = [sys.executable, "-m", "benchmarks.large_models", *sys.argv[1:], "--child", checkpoint, bundle]
        print(run_measured(command).stdout, end="")
    try:
        describe(bundle)
        if not arguments.real:
            run(bundle, arguments)
    finally:
        if not arguments.keep:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
