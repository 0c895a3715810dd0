"""Resident memory and speed of a quantized bundle of target onnx with all of its graphs open: weights packed once for all graphs, and once
per graph, as ONNX Runtime's Python sessions do it.

    python -m benchmarks.portable_memory BUNDLE [BUNDLE ...] [--tokens 512] [--rounds 3] [--threads 2]

Each form runs in processes of its own, in turns: load, a prompt, steps, verifies, and the draft head's graphs. `open` is what the process
has when all graphs are open, `end` what it has at the end, with states, caches and activations; both are anonymous and file pages, besides
what it had before the bundle was loaded. MB are 2^20 bytes. Linux only. Times are the best of all rounds: CPU seconds of all threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from qwen_export.manifest import load_manifest
from qwen_export.runtimes import load
from qwen_export.runtimes.backends.onnxruntime import onnxruntime_library
from qwen_export.runtimes.decoding.static_decoder import StaticDecoder

FORMS = {"once": "packed once", "per_graph": "packed per graph"}
_STEPS, _VERIFIES = 16, 8


def status() -> Mapping[str, float]:
    """Fields of /proc/self/status in MB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines if words[-1] == "kB"}


def _no_library() -> None:
    """Sessions then are those of the Python binding."""


def child(bundle: Path, form: str, tokens: int, threads: int) -> dict[str, float]:
    """One process: memory at the end, and seconds."""
    import onnxruntime  # noqa: F401 - not a part of the bundle

    if form == "per_graph":
        onnxruntime_library.packing_library = _no_library  # type: ignore[assignment]
    before, started = status(), time.process_time()
    model = load(bundle, threads=threads)
    measured = {"load": time.process_time() - started}
    opened = status()
    decoder = model.decoder(drafts=True)
    assert isinstance(decoder, StaticDecoder)
    decoder.warm()
    ids = np.random.default_rng(0).integers(0, model.manifest.model["vocab_size"], tokens).tolist()

    def seconds(name: str, count: int, work: Callable[[], object]) -> None:
        started = time.process_time()
        for _ in range(count):
            work()
        measured[name] = (time.process_time() - started) / count

    seconds("prompt", 1, lambda: decoder.prefill(ids))
    seconds("step", _STEPS, lambda: decoder.step([ids[0]]))
    W = decoder.widest_verify

    def verify() -> None:
        decoder.verify(ids[:W])
        decoder.accept(W)

    if W:
        seconds("verify", _VERIFIES, verify)
        decoder.step([ids[0]])
    if decoder.head is not None:
        decoder.head.first({0: ids[0]})
    after = status()
    return measured | {
        "open": opened["VmRSS"] - before["VmRSS"],
        "end": after["VmRSS"] - before["VmRSS"],
        "peak": after["VmHWM"] - before["VmRSS"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.bundles[0], options.child, options.tokens, options.threads)))
        return
    for bundle in options.bundles:
        manifest = load_manifest(bundle)
        weights = sum(entry.size for name, entry in manifest.files.items() if name.endswith(".weights")) / 2**20
        print(f"\n{bundle.name}: {len(manifest.graphs)} graphs, weights {weights:.0f} MB")
        print("| | open MB | open / weights | end / weights | peak / weights | load | prompt | step | verify |\n|---|" + "---|" * 8)
        rows: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
        for _ in range(options.rounds):
            for form, results in rows.items():
                command = [sys.executable, "-m", "benchmarks.portable_memory", bundle, "--child", form]
                command += ["--tokens", options.tokens, "--threads", options.threads]
                results.append(json.loads(subprocess.check_output([str(part) for part in command])))
        for form, results in rows.items():
            memory = {name: max(r[name] for r in results) for name in ("open", "end", "peak")}
            best = {name: min(r[name] for r in results) for name in ("load", "prompt", "step", "verify") if name in results[0]}
            shares = " | ".join(f"{memory[name] / weights:.2f}" for name in memory)
            times = " | ".join(f"{best[name]:.3f}" if name in best else "" for name in ("load", "prompt", "step", "verify"))
            print(f"| {FORMS[form]} | {memory['open']:.0f} | {shares} | {times} |", flush=True)


if __name__ == "__main__":
    main()
