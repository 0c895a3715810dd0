"""A mixture of experts on a GPU that is too small for it: rates by what the GPU may hold of the weights, the rest in host memory.

    python -m benchmarks.host_experts                                      # the 35B-A3B in int4, on one GPU
    python -m benchmarks.host_experts --layers 20 --budgets 12,9,6,3       # half of it: builds in half of the time
    python -m benchmarks.host_experts --size tiny --device cpu             # a trial of the build; budgets are for GPUs

A budget is an artificial limit: the GPU may have more. Values of the checkpoint are generated where a file would be read. A line that says
"refused" has what `load` says: the CPU alone would be faster.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.build_memory import generate_values, sparse_checkpoint
from benchmarks.large_models import SIZES
from benchmarks.measured_process import run_measured
from benchmarks.stages import SHORT, config_of
from qwen_export.errors import QwenExportError
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import load
from qwen_export.runtimes.memory import cuda_driver, memory_rates
from qwen_export.runtimes.memory.mapped_weights import weight_bytes


def child(arguments: argparse.Namespace, checkpoint: Path, bundle: Path) -> None:
    from qwen_export import build

    generate_values()
    started = time.perf_counter()
    build(
        checkpoint,
        bundle,
        device=arguments.device,
        precision=arguments.precision,
        mtp=False,
        vision=False,
        host_experts=True,
        max_context=arguments.max_context,
        max_memory=int(arguments.max_memory * 1e9) if arguments.max_memory else None,
    )
    print(f"built in {time.perf_counter() - started:.0f} s")


def measure(bundle: Path, budget: float | None, arguments: argparse.Namespace) -> dict[str, float]:
    """Rates in tokens per second, seconds, bytes."""
    gc.collect()  # what the model before has held
    on = {"weight_budget": None if budget is None else int(budget * 1e9)} if arguments.device == "cuda" else {}
    before, started = free(arguments.device), time.perf_counter()
    chance, decode, prefill = np.random.default_rng(0), [], []
    with load(bundle, speculate="off", **on) as model:
        decoder, loaded = model.decoder(), time.perf_counter() - started
        prompt = chance.integers(0, model.manifest.model["vocab_size"], arguments.prompt_tokens).tolist()
        for _ in range(arguments.rounds + 1):
            decoder.reset()
            started = time.perf_counter()
            decoder.prefill(prompt)
            prefill.append(len(prompt) / (time.perf_counter() - started))
            decoder.reset()
            token = int(decoder.prefill(prompt[:SHORT]).argmax())
            started = time.perf_counter()
            for _ in range(arguments.new_tokens):
                token = int(decoder.step([token])[0].argmax())
            decode.append(arguments.new_tokens / (time.perf_counter() - started))
        taken = before - free(arguments.device)
    return {"load_s": loaded, "decode": median(decode[1:]), "prefill": median(prefill[1:]), "gpu_bytes": taken}


def free(device: str) -> int:
    return cuda_driver.memory_info()[0] if device == "cuda" else 0


def table(bundle: Path, arguments: argparse.Namespace) -> None:
    graph = load_manifest(bundle).graphs["decoder"]
    experts = sum(weight_bytes(weight) for weight in graph.weights if weight.name in graph.bound)
    others = sum(weight_bytes(weight) for weight in graph.weights) - experts
    print(f"experts {experts / 1e9:.1f} GB, other weights {others / 1e9:.1f} GB")
    print(f"the CPU reads memory at {memory_rates.host_rate() / 1e9:.0f} GB/s")
    if arguments.device == "cuda":
        print(f"the bus: {memory_rates.link_rate(0) / 1e9:.0f} GB/s")
    budgets = [None, *map(float, arguments.budgets.split(","))] if arguments.device == "cuda" else [None]
    print("\n| weights on the GPU, GB at most | experts in host memory, GB | GPU memory, GB | load, s | decode, tok/s | prefill, tok/s |")
    print("|---|---|---|---|---|---|")
    for budget in budgets:
        name = "all" if budget is None else f"{budget:g}"
        outside = 0.0 if budget is None else max(0.0, (experts + others) / 1e9 - budget)
        try:
            row = measure(bundle, budget, arguments)
        except QwenExportError as error:
            print(f"| {name} | about {outside:.1f} | refused: {error} | | | |", flush=True)
            continue
        cells = f"{row['gpu_bytes'] / 1e9:.1f} | {row['load_s']:.1f} | {row['decode']:.1f} | {row['prefill']:.0f}"
        print(f"| {name} | about {outside:.1f} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="35B-A3B", choices=list(SIZES))
    parser.add_argument("--layers", type=int, help="fewer than the size has, at least 4")
    parser.add_argument("--budgets", default="22,16,12,8,4")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--max-context", type=int, default=4096)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(".cache/host-experts"))
    parser.add_argument("--max-memory", type=float, metavar="GB", help="of the build: an expert takes 0.1 GB while it is made")
    parser.add_argument("--keep", action="store_true", help="leave the bundle there, and take one that is there")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments, *arguments.child)
        return
    work = arguments.work.resolve() / f"{arguments.size}-{arguments.layers or 'all'}"
    bundle, checkpoint = work / "bundle", work / "checkpoint"
    if not bundle.exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        sparse_checkpoint(config_of(SIZES[arguments.size], arguments.layers), checkpoint)
        command = [sys.executable, "-m", "benchmarks.host_experts", *sys.argv[1:], "--child", checkpoint, bundle]
        print(run_measured(command).stdout, end="")
    try:
        table(bundle, arguments)
    finally:
        if not arguments.keep:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
