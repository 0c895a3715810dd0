"""qwen-export beside onnxruntime-genai on the same checkpoint, on CPU, alternating in one run.

    .venv/bin/python benchmarks/side_by_side.py [--size 0.8B] [--precision fp32] [--rounds 3] [--threads 2] [--reuse] [--json FILE]

Absolute CPU times drift from hour to hour, also within a run; only ratios of neighboring measurements say something. So every round
measures ours and then the peer, each in a fresh process on the same CPUs, and the table gives medians and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measured_process import run_measured

from tests.support.family import FAMILY
from tests.support.synthesize import synthesize

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
PEER_SCRIPT = ROOT / "benchmarks" / "peer_genai.py"
QWEN_EXPORT = Path(sys.executable).with_name("qwen-export")

PARITY_TOKENS = 64
DECODE_GOAL = {"int8": 1.2, "int4": 1.15}
PREFILL_GOAL = {"int8": 1.3, "int4": 1.3}
"""Least ratios of tokens per second, by precision, where they are not those of fp32: 1.0 and 1.1."""


@dataclass(frozen=True)
class Row:
    """One line of the table: the value per round of ours and of the peer. `goal` bounds the ratio ours / peer."""

    name: str
    ours: list[float]
    peer: list[float]
    goal: tuple[str, float] | None = None

    def cells(self) -> list[str]:
        ratio = statistics.median(a / b for a, b in zip(self.ours, self.peer, strict=True))
        goal, met = "", ""
        if self.goal:
            sign, bound = self.goal
            goal, met = f"{sign} {bound:.2f}", "yes" if (ratio >= bound if sign == ">=" else ratio <= bound) else "NO"
        return [self.name, _number(statistics.median(self.ours)), _number(statistics.median(self.peer)), _number(ratio), goal, met]


def compare_runs(
    bundle: Path, peer: Path, prompts: str, new_tokens: int, threads: int, rounds: int, flags: list[str], precision: str
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Measure both `rounds` times, alternating; `flags` are more options for ours. Returns the table's rows and the raw results."""
    workload = ["--prompt-tokens", prompts, "--new-tokens", str(new_tokens), "--json"]
    raw = []
    for number in range(1, rounds + 1):
        ours = json.loads(run_measured([QWEN_EXPORT, "bench", bundle, *workload, *flags], cpus=threads).stdout)
        theirs_command = [PEER_PYTHON, PEER_SCRIPT, "run", peer, *workload, "--threads", str(threads)]
        theirs = json.loads(run_measured(theirs_command, cpus=threads).stdout)
        raw.append({"ours": ours, "peer": theirs})
        decode = f"decode {ours['decode_tok_per_s']:.2f} / {theirs['decode_tok_per_s']:.2f} tok/s"
        print(f"round {number}/{rounds}: {decode}", file=sys.stderr, flush=True)

    def row(name: str, key: str, goal: tuple[str, float]) -> Row:
        return Row(name, [r["ours"][key] for r in raw], [r["peer"][key] for r in raw], goal)

    rows = []
    for i, tokens in enumerate(int(n) for n in prompts.split(",")):
        mine, others = ([r[side]["prefill"][i]["tok_per_s"] for r in raw] for side in ("ours", "peer"))
        rows.append(Row(f"prefill {tokens}, tok/s", mine, others, (">=", PREFILL_GOAL.get(precision, 1.1)) if tokens == 512 else None))
    rows.append(row("decode, tok/s", "decode_tok_per_s", (">=", DECODE_GOAL.get(precision, 1.0))))
    rows.append(row("load, s", "load_s", ("<=", 1 / 3)))
    rows.append(row("peak RSS of the run, MB", "peak_rss_mb", ("<=", 0.7)))
    return rows, raw


def compare_exports(checkpoint: Path, bundle: Path, peer: Path, precision: str) -> list[Row]:
    """Build both once and compare time, memory and size on disk."""
    shutil.rmtree(bundle, ignore_errors=True)
    ours = run_measured([QWEN_EXPORT, "build", checkpoint, "-o", bundle, "--precision", precision])
    command = [PEER_PYTHON, PEER_SCRIPT, "export", checkpoint, peer, "--precision", precision, "--ep", "cpu"]
    theirs = json.loads(run_measured(command).stdout)
    disk = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()) / 2**20
    return [
        Row("export, s", [ours.wall_s], [theirs["wall_s"]]),
        Row("peak RSS of the export, MB", [ours.peak_rss_mb], [theirs["peak_rss_mb"]]),
        Row("on disk, MB", [disk], [theirs["disk_mb"]]),
    ]


def compare_logits(checkpoint: Path, bundle: Path, peer: Path, work: Path) -> tuple[Row, float]:
    """Largest absolute error of the logits against transformers in fp32, and the deviation of transformers' logits.

    The peer is read on one prompt of 64 tokens; ours is the largest error of any check of `qwen-export verify`.
    """
    ids, expected, found = work / "ids.npy", work / "reference.npy", work / "peer.npy"
    vocab = json.loads((peer / "genai_config.json").read_text())["model"]["vocab_size"]
    np.save(ids, np.random.default_rng(0).integers(0, vocab - 300, PARITY_TOKENS))
    reference = json.loads(run_measured([PEER_PYTHON, PEER_SCRIPT, "reference", checkpoint, ids, expected]).stdout)
    run_measured([PEER_PYTHON, PEER_SCRIPT, "logits", peer, ids, found])
    theirs = float(np.abs(np.load(found) - np.load(expected)).max())
    checks = json.loads(run_measured([QWEN_EXPORT, "verify", bundle, "--reference", checkpoint, "--json"]).stdout)["checks"]
    # Of quantized weights verify tells the root mean square; the largest errors are in the notes.
    noted = [
        float(check["note"].rsplit("max ", 1)[1]) for check in checks if "rms error" in check["note"] and "quant." not in check["against"]
    ]
    ours = max([*noted, *(check["max_abs_error"] for check in checks if check["max_abs_error"] is not None)])
    return Row("logits, max abs error", [ours], [theirs]), reference["std"]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2e}" if value < 0.001 else f"{value:.3g}"


def print_table(rows: list[Row]) -> None:
    header = ["", "qwen-export", "onnxruntime-genai", "ratio", "goal", "met"]
    lines = [header, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.8B", choices=FAMILY, help="shape of the generated checkpoint")
    parser.add_argument("--checkpoint", type=Path, help="use this one instead of a generated one")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16", "bf16", "int8", "int4"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", default="128,512,2048")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repack", action="store_true", help="load ours with repacked weights: for a bundle without the CPU plugin")
    parser.add_argument("--reuse", action="store_true", help="take the exports of an earlier call, measure only the runs")
    parser.add_argument("--no-parity", action="store_true", help="leave out the comparison with transformers")
    parser.add_argument("--json", type=Path, help="write the raw results here")
    options = parser.parse_args()

    checkpoint = options.checkpoint or CACHE / "checkpoints" / options.size
    if not (checkpoint / "config.json").exists():
        synthesize(FAMILY[options.size], checkpoint)
    name = f"{checkpoint.name}-{options.precision}"
    bundle, peer = CACHE / "bundles" / name, CACHE / "peers" / name
    bundle.parent.mkdir(parents=True, exist_ok=True)

    rows = []
    if not (options.reuse and bundle.exists() and peer.exists()):
        rows += compare_exports(checkpoint, bundle, peer, options.precision)
    flags = ["--repack"] if options.repack else []
    runs, raw = compare_runs(
        bundle, peer, options.prompt_tokens, options.new_tokens, options.threads, options.rounds, flags, options.precision
    )
    rows += runs
    deviation = None
    if not options.no_parity:
        parity, deviation = compare_logits(checkpoint, bundle, peer, CACHE / "peers")
        rows.append(parity)

    print(f"{checkpoint.name}, {options.precision}, {options.threads} threads, medians of {options.rounds} rounds\n")
    print_table(rows)
    if deviation is not None:
        print(f"\nStandard deviation of the logits: {deviation:.3f}")
    if options.json:
        table = {row.name: {"ours": row.ours, "peer": row.peer} for row in rows}
        options.json.write_text(json.dumps({"table": table, "rounds": raw, "logit_std": deviation}, indent=2) + "\n")


if __name__ == "__main__":
    main()
