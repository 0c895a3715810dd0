"""What a batch costs on the CPU beside a step of one row, with each set of kernels and number of threads.

    .venv/bin/python benchmarks/cpu_batches.py BUNDLE [--sets avx512,amx] [--threads 1,2] [--calls 1,2,4,8,16,32,8x2] [--past 256]
    .venv/bin/python benchmarks/cpu_batches.py BUNDLE --operators --sets amx --threads 1 --calls 1,8,32

A call of 8 is a step of 8 sequences; of 8x2 a verify of 2 tokens of each. QWEN_EXPORT_CPU_SET chooses the kernels, a process each; calls
take turns, and the least of all rounds counts: CPU time with one thread, time by the clock with more. With --operators ONNX Runtime's
profiler tells what each operator takes of the fastest call.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.read import Read

_PIECE, _SHOWN = 64, 9
Shape = tuple[int, int]


def shape_of(text: str) -> Shape:
    """Sequences and tokens of each: of 8 and of 8x2."""
    rows, _, tokens = text.partition("x")
    return int(rows), int(tokens or 1)


def call(decoder: Decoder, shape: Shape) -> None:
    rows, tokens = shape
    if tokens == 1:
        decoder.advance([5] * rows)
    else:
        decoder.run([Read(slot, [5] * tokens, commit=False, logits=tokens) for slot in range(rows)])


def profiled(folder: str) -> None:
    """Have all sessions count what operators take."""
    made = ort.SessionOptions

    def options() -> ort.SessionOptions:
        result = made()
        result.enable_profiling, result.profile_file_prefix = True, f"{folder}/profile"
        return result

    ort.SessionOptions = options


def operators(decoder: Any, shapes: list[Shape], rounds: int) -> list[dict[str, float]]:
    """Milliseconds by operator of the fastest call of each shape; calls took turns."""
    events = json.loads(Path(decoder.session.native.end_profiling()).read_text())
    calls = [event for event in events if event["name"] == "model_run"][-rounds * len(shapes) :]
    result = []
    for place in range(len(shapes)):
        fastest = min(calls[place :: len(shapes)], key=lambda event: int(event["dur"]))
        begin, end = fastest["ts"], fastest["ts"] + fastest["dur"]
        times: collections.Counter[str] = collections.Counter()
        for event in events:
            if begin <= event["ts"] < end and event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                shape = next(iter(event["args"]["output_type_shape"][0].values()))
                width = f" of {shape[-1]}" if event["args"]["op_name"] == "QuantLinear" else ""
                times[event["args"]["op_name"] + width] += event["dur"]
        result.append({name: time / 1e3 for name, time in times.items()} | {"all": fastest["dur"] / 1e3})
    return result


def measure(bundle: Path, threads: int, shapes: list[Shape], past: int, rounds: int, *, by_operator: bool) -> list[Any]:
    """Milliseconds of each call, or by operator."""
    with tempfile.TemporaryDirectory() as folder:
        if by_operator:
            profiled(folder)
        clock = time.process_time if threads == 1 else time.perf_counter
        rng, slots = np.random.default_rng(0), max(rows for rows, _ in shapes)
        tokens = past + sum(width for _, width in shapes) * (rounds + 1)
        decoder = load(bundle, threads=threads, max_context=tokens).decoder(slots)
        for slot in range(slots):
            for start in range(0, past, _PIECE):
                decoder.run([Read(slot, rng.integers(0, 1000, min(_PIECE, past - start)).tolist(), logits=0)])
        times: list[list[float]] = [[] for _ in shapes]
        for _ in range(rounds):
            for place, shape in enumerate(shapes):
                begun = clock()
                call(decoder, shape)
                times[place].append((clock() - begun) * 1e3)
                if shape[1] > 1:
                    for slot in range(shape[0]):
                        decoder.accept(1, slot)
        return operators(decoder, shapes, rounds) if by_operator else [min(each) for each in times]


def print_table(head: list[str], rows: list[list[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--sets", default="avx512,amx")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--calls", default="1,2,4,8,16,32,1x4,8x2")
    parser.add_argument("--past", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--operators", action="store_true")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    calls, threads = options.calls.split(","), options.threads.split(",")
    if options.once:
        shapes = [shape_of(text) for text in calls]
        made = measure(options.bundle, int(threads[0]), shapes, options.past, options.rounds, by_operator=options.operators)
        print(json.dumps(made))
        return
    columns: dict[str, list[Any]] = {}
    for count in threads:
        for name in options.sets.split(","):
            command = [sys.executable, __file__, str(options.bundle), "--once", "--threads", count, "--calls", options.calls]
            command += ["--past", str(options.past), "--rounds", str(options.rounds)] + ["--operators"] * options.operators
            run = subprocess.run(command, env=os.environ | {"QWEN_EXPORT_CPU_SET": name}, check=True, stdout=subprocess.PIPE, text=True)
            columns[f"{name}, {count} thread{'s' * (count != '1')}"] = json.loads(run.stdout)
    if options.operators:
        for column, parts in columns.items():
            names = [name for name, _ in sorted(parts[-1].items(), key=lambda item: -item[1])[:_SHOWN]]
            rows = [[name, *(f"{part.get(name, 0.0):.1f}" for part in parts)] for name in names]
            print_table([f"{column}: ms of a call of", *calls], rows)
            print()
        return
    print_table(
        ["call of", *(part for column in columns for part in (f"{column}, ms", "of a step"))],
        [
            [text, *(part for times in columns.values() for part in (f"{times[place]:.1f}", f"{times[place] / times[0]:.2f}"))]
            for place, text in enumerate(calls)
        ],
    )


if __name__ == "__main__":
    main()
