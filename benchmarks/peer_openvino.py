"""A bundle of target `onnx` on OpenVINO beside OpenVINO's own exporter, in turns in one process.

    PY -m pip install openvino-genai optimum-intel nncf 'transformers==5.2.*'    # an environment of its own, torch first
    PY -m pip install tokenizers jinja2 psutil platformdirs                      # what the runtime needs
    python -m benchmarks.peer_streams prepare 0.8B WORK                          # a checkpoint of the shape, with random weights
    optimum-cli export openvino --task text-generation-with-past --weight-format int8 --model WORK/checkpoint WORK/openvino
    qwen-export build WORK/checkpoint -o WORK/portable --target onnx --precision int8 --max-context 1024
    PY benchmarks/peer_openvino.py WORK/portable WORK/openvino

The exporter's model runs in OpenVINO GenAI with that package's defaults, ours as `load(runtime="openvino")`. A prompt is timed to its first
token, and steps behind a prompt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

Seconds = Callable[[list[int], int], tuple[float, float]]
"""Seconds of a prompt, and of each of so many steps after it."""


def ours(bundle: Path, threads: int, runtime: str) -> Seconds:
    from qwen_export.runtimes import load

    decoder = load(bundle, threads=threads, speculate="off", runtime=runtime).decoder()

    def seconds(ids: list[int], count: int) -> tuple[float, float]:
        decoder.reset()
        began = time.perf_counter()
        token = int(decoder.prefill(ids).argmax())
        first = time.perf_counter()
        for _ in range(count):
            token = int(decoder.step([token])[0].argmax())
        return first - began, (time.perf_counter() - first) / count

    return seconds


def theirs(export: Path, threads: int) -> Seconds:
    import openvino
    import openvino_genai

    pipe = openvino_genai.LLMPipeline(str(export), "CPU", INFERENCE_NUM_THREADS=threads)

    def generated(ids: list[int], count: int) -> float:
        prompt = openvino_genai.TokenizedInputs(openvino.Tensor(np.array([ids])), openvino.Tensor(np.ones((1, len(ids)), np.int64)))
        config = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        began = time.perf_counter()
        pipe.generate(prompt, config)
        return time.perf_counter() - began

    def seconds(ids: list[int], count: int) -> tuple[float, float]:
        first = generated(ids, 1)
        return first, (generated(ids, 1 + count) - first) / count

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--onnxruntime", action="store_true", help="The bundle on ONNX Runtime, too.")
    given = parser.parse_args()
    runtimes = ["openvino", *(["onnxruntime"] if given.onnxruntime else [])]
    sides = {f"bundle, {name}": ours(given.bundle, given.threads, name) for name in runtimes}
    sides["its own exporter"] = theirs(given.export, given.threads)
    ids = [(7919 + 31 * at) % 8000 for at in range(given.prompt_tokens)]
    for side in sides.values():
        side(ids, 2)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(1, given.rounds + 1):
        for name, side in sides.items():
            taken[name].append(side(ids, given.new_tokens))
            prompt, step = taken[name][-1]
            print(f"round {number}, {name}: prompt {len(ids) / prompt:.1f} tok/s, steps {1 / step:.2f} tok/s", flush=True)
    print(f"\n| {given.threads} threads, prompt of {len(ids)} | prompt tok/s | to its exporter | steps tok/s | to its exporter |")
    print("|---|---|---|---|---|")
    for name, values in taken.items():
        both = zip(taken["its own exporter"], values, strict=True)
        prompts, steps = zip(*((a / b, c / d) for (a, c), (b, d) in both), strict=True)
        prompt, step = (median(column) for column in zip(*values, strict=True))
        print(f"| {name} | {len(ids) / prompt:.0f} | {median(prompts):.2f} | {1 / step:.1f} | {median(steps):.2f} |")


if __name__ == "__main__":
    main()
