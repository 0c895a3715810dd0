"""Memory and speed of `build` for checkpoints that are larger than the machine.

    python -m benchmarks.build_memory 27B                          # real headers and index, generated values, weights thrown away
    python -m benchmarks.build_memory 35B-A3B --keep --device cuda --precision bf16
    python -m benchmarks.build_memory 397B-A17B --plan             # graph, plan and estimate only
    python -m benchmarks.build_memory --throughput CHECKPOINT      # against reading and writing the same bytes

The shard files have the release's names, shapes and sizes, but no blocks on the disk; what is read from them is replaced by a ring of
normal numbers. Every other step is that of a build, in a process of its own whose peak memory is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.measured_process import peak_rss_mb, run_measured
from qwen_export.graphs.checkpoint import file_access
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.tensor_table import tensor_table
from qwen_export.graphs.weights import hashed_file
from tests.support.family import FAMILY

SHARD_BYTES = 4 << 30
_SIZE = {"BF16": 2, "F16": 2, "F32": 4}


def sparse_checkpoint(config: dict[str, Any], out: Path) -> Path:
    """Index, headers and files of the full size, which take no room."""
    out.mkdir(parents=True)
    shards: list[dict[str, Any]] = [{}]
    filled, total = 0, 0
    for entry in tensor_table(config):
        size = math.prod(entry.shape) * _SIZE[entry.dtype]
        if filled and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [filled, filled + size]}
        filled, total = filled + size, total + size
    weight_map = {}
    for number, header in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(header, name)
        text = json.dumps(header).encode()
        with (out / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (out / "config.json").write_text(json.dumps(config))
    return out


def generate_values() -> None:
    """Reads give values of a ring instead of the files' holes."""
    ring = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32) * np.float32(0.02)
    values = np.tile(ring.astype(ml_dtypes.bfloat16).view(np.uint8), 2)

    def read_into(self: file_access.SharedFile, view: memoryview, offset: int) -> bool:
        done, half = 0, len(values) // 2
        while done < view.nbytes:
            start = (offset + done) // 2 * 2 % half
            count = min(view.nbytes - done, half)
            view[done : done + count] = values[start : start + count].data
            done += count
        return True

    file_access.SharedFile.read_into = read_into  # type: ignore[method-assign]


def discard_writes() -> None:
    hashed_file._write_all = lambda write, data: None


def child(arguments: argparse.Namespace) -> None:
    from qwen_export.building.build_plan import plan_build
    from qwen_export.building.compiler import build
    from qwen_export.building.lower_graphs import lower

    generate_values()
    if not arguments.keep:
        discard_writes()
    checkpoint, out = Path(arguments.child), Path(arguments.child).parent / "bundle"
    start = time.perf_counter()
    if arguments.plan:
        source = open_checkpoint(checkpoint)
        plan = plan_build(source, device=arguments.device, precision=arguments.precision)
        model = lower(source, plan)["decoder"]
        print(f"graph of {sum(1 for _ in model.graph)} nodes, bundle {plan.bundle_bytes / 1e9:.1f} GB, run {plan.run_bytes / 1e9:.1f} GB")
    else:
        begin, size = 0.0, 0

        def report(name: str, done: int, total: int) -> None:
            nonlocal begin, size
            if total:
                begin, size = begin or time.perf_counter(), total

        build(checkpoint, out, device=arguments.device, precision=arguments.precision, jobs=arguments.jobs, report=report)
        print(f"weights {size / 1e9:.1f} GB at {size / 1e6 / (time.perf_counter() - begin):.0f} MB/s")
    print(f"{time.perf_counter() - start:.0f} s, peak RSS {peak_rss_mb():.0f} MB")


def throughput(checkpoint: Path, rounds: int) -> None:
    """Best of some rounds, by turns: a plain copy of as many bytes in and out, and the weights of a build."""
    import onnx_ir as ir

    from qwen_export.graphs.checkpoint.tensor_names import decoder_tensors
    from qwen_export.graphs.weights.expression import StoredWeight, add_weight
    from qwen_export.graphs.weights.weight_writer import weight_bytes, write_weights

    source = open_checkpoint(checkpoint)
    for name, dtype in (("bf16", ir.DataType.BFLOAT16), ("fp32", ir.DataType.FLOAT)):
        copied, made, cpu = math.inf, math.inf, math.inf
        for _ in range(rounds):
            model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)
            for tensor, shape in decoder_tensors(source.config.text):
                add_weight(model.graph, tensor, StoredWeight(tensor, shape, dtype))
            size = weight_bytes([model])
            with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory, CheckpointReader(source) as reader:
                drop_cache(source.path)
                copied = min(copied, seconds(lambda to=Path(directory) / "copy", size=size: copy(source.path, to, size)))
                (Path(directory) / "copy").unlink()
                drop_cache(source.path)
                used = time.process_time()
                made = min(made, seconds(lambda m=model, r=reader, to=Path(directory) / "weights": write_weights([m], r, to)))
                cpu = min(cpu, time.process_time() - used)
        print(f"{name}: copy {copied:.1f} s, weights {made:.1f} s ({cpu:.1f} s of CPU), {size / 1e6 / made:.0f} MB/s, x{made / copied:.2f}")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def drop_cache(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def copy(source: Path, out: Path, size: int) -> None:
    """Read the checkpoint's files once and write `size` bytes, past the page cache, without looking at them."""
    data = bytearray(4 << 20)
    written = 0
    with hashed_file.HashedFile(out) as file:
        file._digest = type("", (), {"update": lambda self, part: None, "hexdigest": lambda self: ""})()
        for path in source.glob("*.safetensors"):
            shared, at, end = file_access.SharedFile(path), 0, path.stat().st_size
            while at < end:
                part = memoryview(data)[: min(len(data), end - at)]
                shared.read_into(part, at)
                at += len(part)
                give = min(len(part), size - written)
                file.write(part[:give])
                written += give
            shared.close()
        while written < size:
            give = min(len(data), size - written)
            file.write(memoryview(data)[:give])
            written += give


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", choices=list(FAMILY))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--keep", action="store_true", help="write the weights to the disk, for its room and speed")
    parser.add_argument("--plan", action="store_true", help="capture and plan, and stop there")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--throughput", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.throughput:
        throughput(arguments.throughput, arguments.rounds)
    elif arguments.child:
        child(arguments)
    else:
        work = Path(tempfile.mkdtemp(dir=arguments.work))
        try:
            checkpoint = sparse_checkpoint(FAMILY[arguments.size], work / "checkpoint")
            print(f"{arguments.size}: {open_checkpoint(checkpoint).nbytes / 1e9:.1f} GB in {len(list(checkpoint.iterdir())) - 2} files")
            print(run_measured([sys.executable, "-m", "benchmarks.build_memory", *sys.argv[1:], "--child", checkpoint]).stdout, end="")
        finally:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
