"""TensorRT beside ONNX Runtime on one CUDA device, in one run: prefill and decode rates, speculation, start and memory.

    python benchmarks/tensorrt_table.py [--sizes 0.8B,4B] [--precisions fp16] [--flavour tensorrt-rtx] [--plugin] [--text FILE]

Checkpoints are generated: only their shape matters for the speed. With random weights drafts are worthless, so speculation is measured
on the trained checkpoint of this repository, which continues FILE. `start` is load and first calls: with an empty kernel cache, then again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measured_process import run_measured

from qwen_export import build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.engine_options import PLUGINS, EngineOptions
from qwen_export.runtimes.backends.tensorrt.kernel_cache import VARIABLE
from tests.support.family import FAMILY
from tests.support.synthesize import synthesize

BENCH = (sys.executable, "-m", "qwen_export", "bench")
PROMPTS, NEW_TOKENS = (512, 2048, 4096), 256
CONTEXT = max(PROMPTS) + NEW_TOKENS + 64
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Contestant:
    """A backend and how its bundles are built."""

    name: str
    target: str
    chunk: int | None = None
    plugins: tuple[str, ...] = ()

    def build(self, checkpoint: Path, output: Path, precision: str, context: int) -> Path:
        static = StaticOptions(chunk=self.chunk) if self.chunk else None
        engine = EngineOptions(plugins=self.plugins) if self.chunk else None
        made: dict[str, Any] = {"target": self.target, "device": "cuda", "precision": precision, "max_context": context}
        return build(checkpoint, output, **made, options=static, engine=engine, force=True)


def bench(bundle: Path, *options: object) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run_measured([*BENCH, bundle, "--json", *options]).stdout)
    return result


def measure(contestant: Contestant, checkpoint: Path, work: Path, precision: str, reuse: bool) -> dict[str, Any]:
    """Rates, start times (`cold_s`, `warm_s`) and memory of one bundle."""
    bundle = work / "-".join([checkpoint.name, contestant.target, str(contestant.chunk), precision, *contestant.plugins])
    if not (reuse and (bundle / "manifest.json").exists()):
        contestant.build(checkpoint, bundle, precision, CONTEXT)
    kernels = work / "kernels"
    shutil.rmtree(kernels, ignore_errors=True)
    os.environ[VARIABLE] = str(kernels)
    cold = bench(bundle, "--prompt-tokens", 8, "--new-tokens", 3, "--speculate", "off")
    result = bench(bundle, "--prompt-tokens", ",".join(map(str, PROMPTS)), "--new-tokens", NEW_TOKENS, "--speculate", "off")
    if not reuse:
        shutil.rmtree(bundle)
    return {
        **result,
        "cold_s": cold["load_s"] + cold["first_calls_s"],
        "warm_s": result["load_s"] + result["first_calls_s"],
    }


def measure_drafts(contestant: Contestant, work: Path, precision: str, text: Path) -> dict[str, Any] | None:
    """Speculation of the trained checkpoint, None where its bundle has no draft head."""
    bundle = contestant.build(ROOT / "examples" / "demo-dense", work / "demo", precision, 1024)
    speculation: dict[str, Any] | None = bench(bundle, "--prompt-tokens", 128, "--new-tokens", NEW_TOKENS, "--text", text)["speculation"]
    shutil.rmtree(bundle)
    return speculation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.8B")
    parser.add_argument("--precisions", default="fp16")
    parser.add_argument("--flavour", default="tensorrt-rtx", choices=("tensorrt-rtx", "tensorrt"))
    parser.add_argument("--chunks", default="512", help="prompt calls of these many tokens, a row each")
    parser.add_argument("--plugin", action="store_true", help="engines with our plugin, too")
    parser.add_argument("--text", type=Path, help="a short text that the trained checkpoint continues")
    parser.add_argument("--work", type=Path, default=Path(".cache/tensorrt"))
    parser.add_argument("--reuse", action="store_true", help="keep bundles in --work and take those that are there")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    engines = [Contestant(f"{options.flavour}, {chunk} a call", options.flavour, int(chunk)) for chunk in options.chunks.split(",")]
    if options.plugin:
        engines += [replace(engine, name=f"{engine.name}, plugin", plugins=PLUGINS) for engine in engines]
    contestants = [Contestant("onnxruntime", "onnxruntime"), *engines]
    results = []
    print("| model | precision | backend | prefill " + " | ".join(map(str, PROMPTS)) + " | decode | start, then again | GPU MiB |")
    print("|---" * (6 + len(PROMPTS)) + "|")
    for size in options.sizes.split(","):
        checkpoint = options.work / size
        if not (checkpoint / "config.json").exists():
            synthesize(FAMILY[size], checkpoint)
        for precision in options.precisions.split(","):
            for contestant in contestants:
                got = measure(contestant, checkpoint, options.work, precision, options.reuse)
                prefill = " | ".join(f"{row['tok_per_s']:.0f}" for row in got["prefill"])
                start = f"{got['cold_s']:.1f}, {got['warm_s']:.1f}"
                print(
                    f"| {size} | {precision} | {contestant.name} | {prefill} | {got['decode_tok_per_s']:.0f} | {start} "
                    f"| {got['device_memory_mb']:.0f} |",
                    flush=True,
                )
                results.append({"size": size, "precision": precision, "backend": contestant.name, **got})
    if options.text is not None:
        print("\n| demo-dense | precision | with drafts | without | tokens a round |\n|---|---|---|---|---|")
        for precision in options.precisions.split(","):
            for contestant in contestants:
                drafts = measure_drafts(contestant, options.work, precision, options.text)
                if drafts is None:
                    print(f"| {contestant.name} | {precision} | no draft head | | |", flush=True)
                    continue
                print(
                    f"| {contestant.name} | {precision} | {drafts['tok_per_s']:.0f} | {drafts['plain_tok_per_s']:.0f} "
                    f"| {drafts['tokens_per_round']:.2f} |",
                    flush=True,
                )
                results.append({"size": "demo-dense", "precision": precision, "backend": contestant.name, "speculation": drafts})
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
