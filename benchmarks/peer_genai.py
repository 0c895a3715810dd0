"""onnxruntime-genai as the peer: export with its model builder, run, and logits. Runs in `.venv-peers` (`setup_peers.sh`).

    .venv-peers/bin/python benchmarks/peer_genai.py export CKPT OUT [--precision fp32] [--ep cpu|cuda]
    .venv-peers/bin/python benchmarks/peer_genai.py run OUT [--prompt-tokens 128,512,2048] [--new-tokens 64] [--threads 2]
    .venv-peers/bin/python benchmarks/peer_genai.py logits OUT IDS.npy LOGITS.npy
    .venv-peers/bin/python benchmarks/peer_genai.py reference CKPT IDS.npy LOGITS.npy     # transformers, fp32

Each command prints one JSON object. `run` measures in its own process, so its peak memory is that of loading and running alone; its keys
are those of `qwen-export bench --json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measured_process import peak_rss_mb, run_measured

BUILDER_OPTIONS = ("exclude_embeds=false", "exclude_mtp=true")  # token ids in, and no MTP head: 0.18 cannot load it on CPU


def export(checkpoint: Path, out: Path, precision: str, ep: str) -> dict[str, Any]:
    """Build the model. The builder's progress goes to stderr of the child and is shown only if it fails."""
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as cache:
        builder: list[object] = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-i",
            checkpoint,
            "-o",
            out,
            "-p",
            precision,
            "-e",
            ep,
        ]
        options = [*BUILDER_OPTIONS, "enable_cuda_graph=1"] if ep == "cuda" else BUILDER_OPTIONS
        measured = run_measured([*builder, "-c", cache, "--extra_options", *options])
    disk = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"wall_s": measured.wall_s, "peak_rss_mb": measured.peak_rss_mb, "disk_mb": disk / 2**20}


def run(out: Path, prompts: list[int], new_tokens: int, threads: int, repeats: int) -> dict[str, Any]:
    """Load once, then prefill every length and decode `new_tokens` after the shortest.

    Rates are tokens per second, medians of `repeats`; a prefill ends when the first token is sampled.
    """
    import onnxruntime_genai as og

    start = time.perf_counter()
    model = _load(og, out, threads)
    load_s = time.perf_counter() - start
    vocab = json.loads((out / "genai_config.json").read_text())["model"]["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocab - 300, max(prompts)).astype(np.int32)
    # The default is the context length of the checkpoint, for which the caches would be allocated.
    max_length = max(prompts) + new_tokens + 1

    def generator(prompt: Any) -> tuple[Any, float]:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=max_length, do_sample=False)
        generator = og.Generator(model, parameters)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()  # samples from the logits of the prompt, and waits for them where they come from a GPU
        return generator, time.perf_counter() - start

    def decode(prompt: Any) -> float:
        active, _ = generator(prompt)
        start, count = time.perf_counter(), 0
        while count < new_tokens and not active.is_done():
            active.generate_next_token()
            count += 1
        return count / (time.perf_counter() - start)

    generator(ids[:16])  # the first call of a session allocates
    prefill = [{"tokens": n, "tok_per_s": statistics.median(n / generator(ids[:n])[1] for _ in range(repeats))} for n in prompts]
    decode_rate = statistics.median(decode(ids[: min(prompts)]) for _ in range(repeats))
    return {"load_s": load_s, "peak_rss_mb": peak_rss_mb(), "prefill": prefill, "decode_tok_per_s": decode_rate}


def logits(out: Path, ids_file: Path, logits_file: Path) -> dict[str, Any]:
    """Logits of every position of the prompt, float32 [T, vocab], from one prefill."""
    import onnxruntime_genai as og

    ids = np.load(ids_file).astype(np.int32)
    model = _load(og, out, threads=0)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 1, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    values = np.asarray(generator.get_output("logits"), np.float32)[0]
    np.save(logits_file, values)
    return {"rows": len(values)}


def reference(checkpoint: Path, ids_file: Path, logits_file: Path) -> dict[str, Any]:
    """The same from transformers in fp32."""
    import torch
    import transformers

    architecture = json.loads((checkpoint / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.load(ids_file).astype(np.int64))[None]
    with torch.inference_mode():
        values = model(input_ids=ids).logits[0].numpy()
    np.save(logits_file, values)
    return {"rows": len(values), "std": float(values.std())}


def _load(og: Any, out: Path, threads: int) -> Any:
    config = og.Config(str(out))
    if threads:
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    return og.Model(config)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    export_ = commands.add_parser("export")
    export_.add_argument("checkpoint", type=Path)
    export_.add_argument("out", type=Path)
    export_.add_argument("--precision", default="fp32", choices=["fp32", "fp16", "bf16", "int8", "int4"])
    export_.add_argument("--ep", default="cpu", choices=["cpu", "cuda"])
    run_ = commands.add_parser("run")
    run_.add_argument("out", type=Path)
    run_.add_argument("--prompt-tokens", default="128,512,2048")
    run_.add_argument("--new-tokens", type=int, default=64)
    run_.add_argument("--threads", type=int, default=2)
    run_.add_argument("--repeats", type=int, default=1)
    run_.add_argument("--json", action="store_true", help="accepted for symmetry: the output is always JSON")
    for name, source in (("logits", "out"), ("reference", "checkpoint")):
        command = commands.add_parser(name)
        command.add_argument(source, type=Path)
        command.add_argument("ids", type=Path)
        command.add_argument("logits", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.command == "export":
        result = export(arguments.checkpoint, arguments.out, arguments.precision, arguments.ep)
    elif arguments.command == "run":
        prompts = [int(n) for n in arguments.prompt_tokens.split(",")]
        result = run(arguments.out, prompts, arguments.new_tokens, arguments.threads, arguments.repeats)
    elif arguments.command == "logits":
        result = logits(arguments.out, arguments.ids, arguments.logits)
    else:
        result = reference(arguments.checkpoint, arguments.ids, arguments.logits)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
