"""Memory of a mixture of experts on target `onnx`: layers of the 35B-A3B in their real shape, generated values.

    python -m benchmarks.portable_experts [--layers 4] [--precision int4] [--tokens 512] [--chunk 256] [--vocab 8320]

The checkpoint's files have no blocks on the disk (benchmarks.build_memory); the bundle is built in a process of its own, and run in
another: load, a prompt, steps, a verify. Printed are the resident memory after each, what of it is mapped from files and what is not, and
the peak beside the bytes of the weights. Values are random, and so is the routing: a prompt reads almost all experts. MB are 2^20 bytes.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.build_memory import generate_values, sparse_checkpoint
from benchmarks.measured_process import run_measured
from benchmarks.run_memory import show, status
from qwen_export.building.static_plan import StaticOptions
from qwen_export.manifest import load_manifest
from tests.support.family import FAMILY

_SIZE = "35B-A3B"


def build_bundle(work: Path, arguments: argparse.Namespace) -> None:
    from qwen_export.building.compiler import build

    config = copy.deepcopy(FAMILY[_SIZE])
    del config["vision_config"]
    text = config["text_config"]
    text |= {"num_hidden_layers": arguments.layers, "layer_types": text["layer_types"][: arguments.layers], "vocab_size": arguments.vocab}
    generate_values()
    checkpoint = sparse_checkpoint(config, work / "checkpoint")
    options = StaticOptions(arguments.chunk)
    build(
        checkpoint, work / "bundle", target="onnx", precision=arguments.precision, max_context=2048, mtp=False, lookup=True, options=options
    )


def run_bundle(bundle: Path, arguments: argparse.Namespace) -> None:
    from qwen_export.runtimes import load

    manifest = load_manifest(bundle)
    weights = sum(entry.size for name, entry in manifest.files.items() if name.endswith(".weights")) / 2**20
    show("interpreter, libraries")
    decoder = load(bundle, threads=arguments.threads, speculate="off").decoder()
    show("loaded")
    ids = np.random.default_rng(0).integers(0, arguments.vocab, arguments.tokens + 12).tolist()
    seconds = []
    for stage, read in (
        (f"prompt of {arguments.tokens} tokens", lambda: decoder.prefill(ids[: arguments.tokens])),
        ("8 steps", lambda: [decoder.step([token]) for token in ids[arguments.tokens : -4]]),
        ("verify of 4 tokens", lambda: decoder.verify(ids[-4:])),
    ):
        start = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - start)
        show(stage)
    print("seconds: " + ", ".join(f"{value:.1f}" for value in seconds))
    peak = status()["VmHWM"]
    print(
        f"{arguments.layers} layers, {arguments.precision}: weights {weights:.0f} MB, peak {peak:.0f} MB, {peak / weights:.2f} times them"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8320)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, work = arguments.child[0], Path(arguments.child[1])
        build_bundle(work, arguments) if what == "build" else run_bundle(work / "bundle", arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        for what in ("build", "run"):
            made = run_measured([sys.executable, "-m", "benchmarks.portable_experts", *sys.argv[1:], "--child", what, work])
            print(f"{what}: {made.wall_s:.0f} s, peak {made.peak_rss_mb:.0f} MB")
            print(made.stdout, end="")


if __name__ == "__main__":
    main()
