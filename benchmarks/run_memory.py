"""Resident memory of a run, stage by stage, and what it is made of.

    python benchmarks/run_memory.py BUNDLE [--prompt-tokens 2048] [--drafts] [--threads 2]

`file` are mapped pages, weights and libraries; `anonymous` is everything else. Linux only. MB are 2^20 bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qwen_export.manifest import load_manifest
from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.memory.host_buffer import HostBuffer
from qwen_export.runtimes.sampling.sampler import Sampler, SamplingParams

_PAGE = 4096


def status() -> Mapping[str, float]:
    """Fields of /proc/self/status in MB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines if words[-1] == "kB"}


def show(stage: str) -> None:
    now = status()
    print(f"{stage:34} peak {now['VmHWM']:7.1f}  now: anonymous {now['RssAnon']:6.1f}  file {now['RssFile']:6.1f}", flush=True)


def resident_mb(buffer: HostBuffer) -> float:
    """Pages of a buffer that are in memory."""
    first, last = buffer.address // _PAGE, -(-(buffer.address + buffer.nbytes) // _PAGE)
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(first * 8)
        entries = np.frombuffer(pagemap.read((last - first) * 8), np.uint64)
    return float((entries >> np.uint64(63)).sum()) * _PAGE / 2**20


def parts(decoder: Decoder) -> Mapping[str, float]:
    groups: dict[str, float] = {}
    buffers = {**decoder.states, **{f"{name} table": table for name, table in decoder.tables.items()}}
    for name, buffer in buffers.items():
        key = "caches" if name.endswith("_cache") else "rotary tables" if name.endswith("table") else "recurrent states"
        groups[key] = groups.get(key, 0.0) + resident_mb(buffer)  # type: ignore[arg-type]
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--drafts", action="store_true", help="with the draft head, and drafts behind the prompt")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    manifest = load_manifest(arguments.bundle)
    weights = sum(entry.size for name, entry in manifest.files.items() if name.endswith(".weights")) / 2**20
    show("interpreter, libraries")
    model = load(arguments.bundle, threads=arguments.threads, speculate="auto" if arguments.drafts else "off")
    show("loaded")
    ids = np.random.default_rng(0).integers(0, manifest.model["vocab_size"], arguments.prompt_tokens).tolist()
    if arguments.drafts:
        list(model.generate(Request(ids, Sampler(SamplingParams(greedy=True)), (), 32), Statistics()))
        show(f"prompt of {len(ids)}, 32 tokens, drafts")
    else:
        decoder = model.decoder()
        decoder.prefill(ids)
        show(f"prompt of {len(ids)}")
        for _ in range(8):
            decoder.step([0])
        show("8 steps")
        print("of which " + ", ".join(f"{name} {size:.1f}" for name, size in parts(decoder).items()))
    print(f"weights {weights:.1f} MB, peak / weights {status()['VmHWM'] / weights:.2f}")


if __name__ == "__main__":
    main()
