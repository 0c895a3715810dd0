"""Speed of a bundle on this machine: prefill by prompt length, decode, load time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qwen_export.errors import QwenExportError
from qwen_export.manifest import load_manifest
from qwen_export.runtimes.decoding.generation import Request, Statistics, generate
from qwen_export.runtimes.decoding.prefix_reuse import PrefixReuse
from qwen_export.runtimes.decoding.prompt_sizes import read_every_size
from qwen_export.runtimes.memory.cuda_driver import memory_info
from qwen_export.runtimes.model import Model, Speculate, load
from qwen_export.runtimes.sampling.sampler import Sampler, SamplingParams

Report = Callable[[str], None]


def benchmark(
    bundle: Path,
    prompt_tokens: Sequence[int],
    new_tokens: int,
    threads: int | None = None,
    rounds: int = 3,
    report: Report | None = None,
    *,
    repack: bool = False,
    speculate: Speculate = "auto",
    weight_budget: int | None = None,
    text: str | None = None,
    device: str | None = None,
    runtime: str | None = None,
    device_id: int = 0,
    devices: Sequence[int] = (),
    native: str | None = None,
) -> dict[str, Any]:
    """Random tokens, one stream, median of `rounds`. Speeds in tokens per second, times in seconds, memory in MB (2^20 bytes).

    Prefill ends when the last token's logits are there; `first_s` is the first read of a length, after `read_every_size`. Decode is
    measured after the shortest prompt, greedily. Speculation continues `text`, or random tokens, greedily, with and without drafts.
    `first_calls_s` is a short prompt, a step and on a GPU prompts of every size, with all that happens once;
    `device_memory_mb` what a GPU has less of after prompts and steps."""
    say = report or (lambda text: None)
    free = _free_device_memory(device or load_manifest(bundle).target.device)
    say("loading")
    started = time.perf_counter()
    model = load(
        bundle,
        threads=threads,
        repack=repack,
        speculate=speculate,
        weight_budget=weight_budget,
        device=device,
        runtime=runtime,
        device_id=device_id,
        devices=devices,
        native=native,
    )
    load_s = time.perf_counter() - started
    need = max(prompt_tokens) + new_tokens + 1
    if need > model.manifest.max_context:
        raise QwenExportError(
            "the benchmark does not fit the bundle's context",
            got=f"{need} tokens",
            expected=f"at most {model.manifest.max_context}",
            fix="Give a smaller {prompt_tokens} or {new_tokens}.",
        )
    decoder = model.decoder()
    capacity = decoder.capacity
    generator, greedy = np.random.default_rng(0), Sampler(SamplingParams(greedy=True))
    vocabulary = model.manifest.model["vocab_size"]
    started = time.perf_counter()
    decoder.prefill(generator.integers(0, vocabulary, 8).tolist())
    decoder.step([0])
    read_every_size(decoder)
    first_calls_s = time.perf_counter() - started
    prefill, decode = [], []
    for count in sorted(prompt_tokens):
        ids = generator.integers(0, vocabulary, count).tolist()
        times = []
        for i in range(rounds):
            say(f"prefill {count}, round {i + 1}")
            decoder.reset()
            started = time.perf_counter()
            logits = decoder.prefill(ids)
            times.append(time.perf_counter() - started)
        prefill.append({"tokens": count, "tok_per_s": count / float(np.median(times)), "first_s": times[0]})
        if count == min(prompt_tokens):
            token = int(logits.argmax())
            for i in range(rounds):
                say(f"decode, round {i + 1}")
                started = time.perf_counter()
                for _ in range(new_tokens // rounds or 1):
                    token = greedy.sample(decoder.step([token])[0])
                decode.append((time.perf_counter() - started) / (new_tokens // rounds or 1))
    used = free - _free_device_memory(model.manifest.target.device)
    del decoder  # its caches are not part of what speculation needs
    prompt = model.tokenizer.encode(text) if text is not None else generator.integers(0, vocabulary, min(prompt_tokens)).tolist()
    return {
        "bundle": str(bundle),
        "device": model.manifest.target.device,
        "precision": model.manifest.target.precision,
        "max_context": capacity,
        "load_s": load_s,
        "first_calls_s": first_calls_s,
        "prefill": prefill,
        "decode_tok_per_s": 1 / float(np.median(decode)),
        "speculation": _speculation(model, prompt, new_tokens, say) if model.speculates else None,
        "peak_rss_mb": peak_rss_mb(),
        "device_memory_mb": used / 2**20,
    }


def _free_device_memory(device: str) -> int:
    """Free bytes of the GPU, whoever uses it; 0 where the bundle needs none."""
    return memory_info()[0] if device == "cuda" else 0


def _speculation(model: Model, ids: Sequence[int], new_tokens: int, say: Report) -> dict[str, Any]:
    """One greedy continuation with drafts and the same one without, after one that warms both up."""
    say("speculation")
    runs = {}
    for name, tokens in (("drafted", model.generate), ("plain", partial(generate, PrefixReuse(model.decoder())))):
        for _ in range(2):
            statistics = Statistics()
            request = Request(ids, Sampler(SamplingParams(greedy=True)), (), new_tokens)
            list(tokens(request, statistics))
        runs[name] = statistics
    numbers = runs["drafted"].speculation
    return {
        "tok_per_s": runs["drafted"].decode_tok_per_s,
        "plain_tok_per_s": runs["plain"].decode_tok_per_s,
        "rounds": numbers.rounds,
        "drafted": numbers.drafted,
        "accepted": numbers.accepted,
        "acceptance": numbers.acceptance,
        "tokens_per_round": numbers.tokens_per_round,
        "draft_s": numbers.draft_s,
        "verify_s": numbers.verify_s,
        "host_s": numbers.host_s,
    }


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB; 0 where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0
