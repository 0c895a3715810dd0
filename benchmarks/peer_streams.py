"""Several streams on the CPU: an engine beside llama.cpp's server and OpenVINO GenAI's continuous batching, alternating in one run.

    PY -m pip install xllamacpp openvino-genai optimum-intel nncf 'transformers==5.2.*'    # an environment of its own, torch first
    python -m benchmarks.peer_streams prepare 0.8B WORK                # random weights of a release, as a bundle and a GGUF file
    cd WORK && optimum-cli export openvino --task text-generation-with-past --weight-format int4 --group-size-fallback ignore \\
        --model checkpoint openvino
    python -m benchmarks.peer_streams compare WORK --peer-python PY [--streams 8] [--rounds 3] [--threads 2]

int4 everywhere: blocks of 32 with Q8_0 for the embedding in llama.cpp, the exporter's own choice in OpenVINO. Each round starts every
program in a process of its own on the same CPUs; rates are of all streams together after their first tokens, medians over the rounds. Needs
a quiet machine: peers wait by spinning.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from benchmarks.measured_process import run_measured

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "demo-dense"

LLAMA = """
import json, sys, threading, xllamacpp
path, threads, streams, count, length = sys.argv[1], *map(int, sys.argv[2:6])
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel = path, streams * (length + count + 16), streams
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(p)
rates = [0.0] * streams
def ask(i):
    prompt = [(7919 * (i + 1) + 31 * j) % 8000 for j in range(length)]
    body = {"prompt": prompt, "n_predict": count, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    result = server.handle_completions(body)
    result = json.loads(result) if isinstance(result, str) else result
    rates[i] = result["timings"]["predicted_per_second"]
for _ in range(2):  # the first one warms up
    workers = [threading.Thread(target=ask, args=(i,)) for i in range(streams)]
    [w.start() for w in workers], [w.join() for w in workers]
print(json.dumps(sum(rates)))
"""

OPENVINO = """
import json, sys, time
import numpy as np, openvino as ov, openvino_genai as genai
path, threads, streams, count, length = sys.argv[1], *map(int, sys.argv[2:6])
scheduler = genai.SchedulerConfig()
scheduler.enable_prefix_caching, scheduler.max_num_seqs, scheduler.cache_size = False, streams, 2
pipe = genai.ContinuousBatchingPipeline(path, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})
prompts = [ov.Tensor(np.array([[(7919 * (i + 1) + 31 * j) % 8000 for j in range(length)]], np.int64)) for i in range(streams)]
def seconds(new):
    config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
    began = time.perf_counter()
    pipe.generate(prompts, [config] * streams)
    return time.perf_counter() - began
seconds(2)
print(json.dumps(streams * (count - 1) / (seconds(count) - seconds(1))))
"""


def prepare(size: str, work: Path) -> None:
    import gguf

    from qwen_export import build
    from tests.support.family import FAMILY
    from tests.support.gguf_files import matrices, write_gguf
    from tests.support.synthesize import synthesize

    config = json.loads(json.dumps(FAMILY[size]))
    config["text_config"]["mtp_num_hidden_layers"] = 0
    checkpoint = synthesize(config, work / "checkpoint", with_mtp=False, with_vision=False, tokenizer=EXAMPLE)
    build(checkpoint, work / "bundle", precision="int4", max_context=4096)
    kinds = gguf.GGMLQuantizationType
    wide, narrow = matrices(kinds.Q8_0), matrices(kinds.Q4_0)
    write_gguf(checkpoint, work / "model.gguf", lambda name, shape: (wide if "token_embd" in name else narrow)(name, shape))


def ours(bundle: Path, streams: tuple[int, ...], threads: int, count: int, length: int) -> list[float]:
    command = [Path(sys.executable).with_name("qwen-export"), "bench", bundle, "--streams", ",".join(map(str, streams)), "--json"]
    options = ["--prompt-tokens", length, "--new-tokens", count, "--threads", threads, "--speculate", "off"]
    return [row["engine_tok_per_s"] for row in json.loads(run_measured([*command, *options], cpus=threads).stdout)]


def compare(work: Path, peer: str, streams: int, rounds: int, threads: int, count: int, length: int) -> None:
    numbers = [str(value) for value in (threads, streams, count, length)]
    rates: dict[str, list[float]] = {"one stream": [], "ours": [], "llama.cpp": [], "OpenVINO": []}
    for number in range(1, rounds + 1):
        for name, rate in zip(("one stream", "ours"), ours(work / "bundle", (1, streams), threads, count, length), strict=True):
            rates[name].append(rate)
        for name, code, model in (("llama.cpp", LLAMA, work / "model.gguf"), ("OpenVINO", OPENVINO, work / "openvino")):
            if model.exists():
                result = run_measured([peer, "-c", code, model, *numbers], cpus=threads)
                rates[name].append(float(result.stdout.strip().splitlines()[-1]))
        print(f"round {number}: " + ", ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items() if values), flush=True)
    print(f"\n| {streams} streams, {threads} threads | tok/s together | ours to it |\n|---|---|---|")
    for name, values in rates.items():
        if values:
            ratio = median(a / b for a, b in zip(rates["ours"], values, strict=True))
            print(f"| {name} | {median(values):.1f} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("size", help="a release, such as 0.8B")
    preparing.add_argument("work", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("work", type=Path)
    comparing.add_argument("--peer-python", required=True)
    comparing.add_argument("--streams", type=int, default=8)
    comparing.add_argument("--rounds", type=int, default=3)
    comparing.add_argument("--threads", type=int, default=2)
    comparing.add_argument("--new-tokens", type=int, default=64)
    comparing.add_argument("--prompt-tokens", type=int, default=64)
    given = parser.parse_args()
    if given.command == "prepare":
        prepare(given.size, given.work)
    else:
        compare(given.work, given.peer_python, given.streams, given.rounds, given.threads, given.new_tokens, given.prompt_tokens)


if __name__ == "__main__":
    main()
