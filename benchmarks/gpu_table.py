"""Prefill and decode rates of qwen-export on a CUDA device, beside those of onnxruntime-genai.

    python benchmarks/gpu_table.py [--sizes 0.8B,4B] [--precisions fp16,bf16] [--work DIR] [--measure-peer] [--json FILE]

Runs on a CUDA host in an environment with `qwen-export[export,onnxruntime-gpu]`. Checkpoints are generated there: only their shape
matters for the speed. The peer's column holds the values measured on one H200 (`PEER_ON_H200`), where an absolute time is repeatable; on
another GPU pass `--measure-peer`, which needs `onnxruntime-genai-cuda` in the same environment.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measured_process import run_measured

from tests.support.family import FAMILY
from tests.support.synthesize import synthesize

QWEN_EXPORT = (sys.executable, "-m", "qwen_export")
PEER_SCRIPT = Path(__file__).with_name("peer_genai.py")
WORKLOAD = ("--prompt-tokens", "128,2048", "--new-tokens", "256")

# onnxruntime-genai 0.18.0 with enable_cuda_graph=1, random weights, one stream: prefill tok/s at 128 and 2048, decode tok/s.
PEER_ON_H200: dict[tuple[str, str], tuple[float, float, float]] = {
    ("0.8B", "fp16"): (17985, 25187, 561),
    ("0.8B", "bf16"): (17385, 24174, 552),
    ("0.8B", "int4"): (16535, 24849, 635),
    ("4B", "fp16"): (9626, 14604, 192),
    ("4B", "int4"): (8274, 14248, 308),
}


def measure(checkpoint: Path, work: Path, precision: str) -> dict[str, Any]:
    """Build a bundle for CUDA and measure it. Keys of `qwen-export bench --json` and `build_s`, `build_rss_mb`."""
    bundle = work / f"{checkpoint.name}-{precision}"
    shutil.rmtree(bundle, ignore_errors=True)
    built = run_measured([*QWEN_EXPORT, "build", checkpoint, "-o", bundle, "--precision", precision, "--device", "cuda"])
    result = json.loads(run_measured([*QWEN_EXPORT, "bench", bundle, *WORKLOAD, "--json"]).stdout)
    shutil.rmtree(bundle)
    return {"build_s": built.wall_s, "build_rss_mb": built.peak_rss_mb, **result}


def measure_peer(checkpoint: Path, work: Path, precision: str) -> dict[str, Any]:
    """The same for onnxruntime-genai with CUDA graph capture of the decode step."""
    out = work / f"{checkpoint.name}-{precision}-genai"
    command = [sys.executable, PEER_SCRIPT, "export", checkpoint, out, "--precision", precision, "--ep", "cuda"]
    built = json.loads(run_measured(command).stdout)
    result = json.loads(run_measured([sys.executable, PEER_SCRIPT, "run", out, *WORKLOAD, "--threads", "0"]).stdout)
    shutil.rmtree(out)
    return {"build_s": built["wall_s"], "build_rss_mb": built["peak_rss_mb"], **result}


def rates(result: dict[str, Any]) -> tuple[float, float, float]:
    return result["prefill"][0]["tok_per_s"], result["prefill"][1]["tok_per_s"], result["decode_tok_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.8B,4B")
    parser.add_argument("--precisions", default="fp16,bf16")
    parser.add_argument("--work", type=Path, default=Path(".cache/gpu"), help="about 25 GB for the 4B")
    parser.add_argument("--measure-peer", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    results = []
    print("| model | precision | prefill 128 (peer) | prefill 2048 (peer) | decode (peer) | decode ratio | build s |")
    print("|---|---|---|---|---|---|---|")
    for size in options.sizes.split(","):
        checkpoint = options.work / size
        if not (checkpoint / "config.json").exists():
            synthesize(FAMILY[size], checkpoint)
        for precision in options.precisions.split(","):
            ours = measure(checkpoint, options.work, precision)
            peer = PEER_ON_H200.get((size, precision))
            if options.measure_peer:
                peer = rates(measure_peer(checkpoint, options.work, precision))
            cells = [f"{a:.0f} ({b:.0f})" for a, b in zip(rates(ours), peer, strict=True)] if peer else [f"{a:.0f}" for a in rates(ours)]
            ratio = f"{ours['decode_tok_per_s'] / peer[2]:.2f}" if peer else ""
            print(f"| {size} | {precision} | {' | '.join(cells)} | {ratio} | {ours['build_s']:.1f} |", flush=True)
            results.append({"size": size, "precision": precision, "ours": ours, "peer": peer})
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
