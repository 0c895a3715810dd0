"""Long contexts on CUDA: what attention caches in fp16, int8 and fp8 take, and what a step, a verify and a prompt behind them cost.

    python benchmarks/cache_precision.py [--size 4B] [--lengths 32768,131072,262144] [--work .cache/gpu]

One bundle with int4 weights, rounded to nearest, is built from a random checkpoint; that with other caches is the same one with other types
of its caches. Contexts are not read: a sequence is said to have them, and its caches hold zeros. "bytes" is what the GPU has less of.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import onnx
from quantization_table import as_toml

from qwen_export import build
from qwen_export.cache_formats import CACHE_FORMATS, CacheFormat
from qwen_export.graphs.quantization.precision_plan import GROUPS
from qwen_export.manifest import GraphSpec, hash_file, load_manifest, write_manifest
from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.memory.cuda_driver import memory_info
from tests.support.family import FAMILY
from tests.support.synthesize import synthesize

CACHES = (".k_cache", ".v_cache", ".k_cache.next", ".v_cache.next")
SPARE = 4096
"""Slots behind a context, for what is measured."""


def with_caches(bundle: Path, output: Path, form: CacheFormat) -> Path:
    """The bundle with caches of another format. Other files are linked."""
    output.mkdir(exist_ok=True)
    manifest = load_manifest(bundle)
    width = form.width(manifest.model["head_dim"])

    def retyped(specs: Any) -> Any:
        return tuple(
            replace(spec, dtype=form.element.manifest, shape=(*spec.shape[:3], width)) if spec.name.endswith(CACHES) else spec
            for spec in specs
        )

    def graph_of(graph: GraphSpec) -> GraphSpec:
        parts = {name: retyped(getattr(graph, name)) for name in ("inputs", "outputs", "states")}
        return replace(graph, **parts)

    files = dict(manifest.files)
    for name in manifest.files:
        target = output / name
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in {graph.file for graph in manifest.graphs.values()}:
            os.link(bundle / name, target)
            continue
        model = onnx.load(bundle / name, load_external_data=False)
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
            if value.name.endswith(CACHES):
                value.type.tensor_type.elem_type = int(getattr(onnx.TensorProto, form.element.onnx))
                value.type.tensor_type.shape.dim[3].dim_value = width
        target.write_bytes(model.SerializeToString())
        files[name] = hash_file(target)
    graphs = {name: graph_of(graph) for name, graph in manifest.graphs.items()}
    plan = manifest.precision_plan | {"attention cache": form.name}
    write_manifest(output, replace(manifest, graphs=graphs, files=files, precision_plan=plan))
    return output


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return median(times)


def verify(decoder: Decoder, tokens: int) -> None:
    decoder.run([Read(0, [1] * tokens, commit=False, logits=tokens)])
    decoder.accept(1)


def row(bundle: Path, length: int, repeats: int) -> dict[str, float]:
    with load(bundle, speculate="off") as model:
        decoder = model.decoder()
        decoder.prefill([1] * 64)
        decoder.warm()
        free = memory_info()[0]
        # Memory for the context comes with the call that is behind it.
        decoder.sequences[0].tokens.extend([1] * (length - decoder.sequences[0].length))
        decoder.step([1])
        took = free - memory_info()[0] + decoder.fixed_bytes
        made = {"bytes": float(took)}
        made["step ms"] = milliseconds(lambda: decoder.step([1]), repeats)
        if decoder.widest_verify > 1:
            verify(decoder, 4), verify(decoder, 4)
            made["verify 4 ms"] = milliseconds(lambda: verify(decoder, 4), repeats)
        decoder.prefill([1] * 512)
        made["prompt 512 ms"] = milliseconds(lambda: decoder.prefill([1] * 512), 3)
        return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4B", choices=list(FAMILY))
    parser.add_argument("--lengths", default="32768,131072,262144")
    parser.add_argument("--formats", default="fp16,int8,fp8")
    parser.add_argument("--precision", default="int4", choices=("int4", "fp16"))
    parser.add_argument("--repeats", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path(".cache/gpu"), help="about 15 GB for the 4B")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    lengths = [int(length) for length in options.lengths.split(",")]
    checkpoint = options.work / options.size
    if not (checkpoint / "config.json").exists():
        synthesize(FAMILY[options.size], checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config.get("text_config", config)["max_position_embeddings"] = max(lengths) + SPARE
    (checkpoint / "config.json").write_text(json.dumps(config))
    plan = options.work / "rtn.toml"
    plan.write_text(as_toml({name: {"method": "rtn"} for name in GROUPS if name != "router"}))
    name = f"{options.size}-{options.precision}-caches"
    plain = build(
        checkpoint,
        options.work / name,
        device="cuda",
        precision=options.precision,
        plan_file=plan if options.precision == "int4" else None,
        max_context=max(lengths) + SPARE,
        mtp=False,
        lookup=True,
        vision=False,
        force=True,
    )
    print(f"{options.size}, {options.precision} weights, one sequence\n")
    print(f"| {'caches':6} | {'context':>8} | {'GB':>6} | {'step ms':>8} | tokens/s | verify 4 ms | prompt 512 ms |")
    print(f"| {'-' * 6} | {'-' * 8} | {'-' * 6} | {'-' * 8} | -------- | ----------- | ------------- |")
    for form in options.formats.split(","):
        bundle = plain if form == "fp16" else with_caches(plain, options.work / f"{name}-{form}", CACHE_FORMATS[form])
        for length in lengths:
            made = row(bundle, length, options.repeats)
            rest = f"{made.get('verify 4 ms', 0):11.2f} | {made['prompt 512 ms']:13.1f}"
            step = made["step ms"]
            print(f"| {form:6} | {length:8} | {made['bytes'] / 1e9:6.2f} | {step:8.3f} | {1e3 / step:8.1f} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
