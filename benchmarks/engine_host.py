"""Host time of an engine's steps, with a backend that does nothing: what scheduling, bindings and choosing tokens cost.

    python -m benchmarks.engine_host BUNDLE [--rows 32] [--steps 400] [--profile]

The bundle gives the shapes of states only; its graphs are not opened. Each case is a row of the table: milliseconds of the processor per
step between two calls of the graph, the median and the least of several spans. Other programs on the machine do not count.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from pathlib import Path
from statistics import median

import numpy as np

from qwen_export.bundle_contract import STEP, TOP_IDS, TOP_LOGITS
from qwen_export.manifest import GraphSpec, load_manifest
from qwen_export.runtimes import SamplingParams
from qwen_export.runtimes.backends.whole_session import WholeCall, WholeSession
from qwen_export.runtimes.decoding.dynamic_decoder import DynamicDecoder
from qwen_export.runtimes.decoding.generation import Request
from qwen_export.runtimes.memory.buffers import Buffer, as_bytes
from qwen_export.runtimes.memory.device import Device
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.serving.engine import Engine

CASES = {
    "greedy": SamplingParams(greedy=True),
    "sampled": SamplingParams(temperature=0.7, top_k=20, top_p=0.8, seed=1),
    "sampled, presence penalty": SamplingParams(temperature=0.7, top_k=20, top_p=0.8, presence_penalty=1.5, seed=1),
}
_SPANS = 8


class IdleSession(WholeSession):
    """A graph that leaves the same likely tokens after every call."""

    records = False

    def __init__(self, spec: GraphSpec) -> None:
        self.spec, self.device, self.busy_s, self.binding_s = spec, Device("cpu"), 0.0, 0.0
        self.host_s, self.left = 0.0, time.thread_time()

    def buffer(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        return self.device.buffer(dtype, shape)

    def call(self, *, repeated: bool) -> IdleCall:
        return IdleCall(self)

    def close(self) -> None:
        pass


class IdleCall(WholeCall):
    """Writes other largest logits in every run; its own time counts as that of the backend."""

    def __init__(self, session: IdleSession) -> None:
        self._session, self._outputs = session, dict[str, Buffer]()
        self._chance = np.random.default_rng(0)

    def bind_input(self, name: str, buffer: Buffer) -> None:
        pass

    def bind_output(self, name: str, buffer: Buffer) -> None:
        self._outputs[name] = buffer

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        started = time.perf_counter()
        self._session.host_s += time.thread_time() - self._session.left
        logits, ids = self._outputs[TOP_LOGITS], self._outputs[TOP_IDS]
        rows, count = ids.shape
        values = -np.sort(-self._chance.normal(0, 3, (rows, count)).astype(np.float32), axis=1)
        logits.write(as_bytes(values))
        ids.write(as_bytes(self._chance.integers(0, 8000 // count, (rows, count), np.int32) * count + np.arange(count, dtype=np.int32)))
        self._session.busy_s += time.perf_counter() - started
        self._session.left = time.thread_time()


def host_ms(bundle: Path, rows: int, steps: int, sampling: SamplingParams, profile: bool) -> list[float]:
    manifest = load_manifest(bundle)
    session = IdleSession(manifest.graphs[STEP])
    requests = [Request(list(range(8, 40)), Sampler(sampling, manifest.model["vocab_size"]), (), None) for _ in range(rows)]
    made: list[float] = []
    profiler = cProfile.Profile() if profile else None

    def decoder() -> DynamicDecoder:
        if profiler is not None:
            profiler.enable()
        return DynamicDecoder(session, manifest, rows, 4096)

    with Engine(decoder, prefix_memory=0, drafts="off") as engine:
        streams = [engine.submit(request) for request in requests]
        while not all(stream.statistics.new_tokens > 32 for stream in streams):
            time.sleep(0.01)
        for _ in range(_SPANS):
            numbers = engine.statistics
            before, host = numbers.steps, session.host_s
            while numbers.steps < before + steps // _SPANS:
                time.sleep(0.02)
            made.append(1e3 * (session.host_s - host) / (numbers.steps - before))
        for stream in streams:
            stream.cancel()
    if profiler is not None:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--profile", action="store_true", help="of the engine's thread")
    given = parser.parse_args()
    print("| rows | median ms per step | least |\n|---|---|---|")
    for name, sampling in CASES.items():
        spans = host_ms(given.bundle, given.rows, given.steps, sampling, given.profile)
        print(f"| {given.rows} {name} | {median(spans):.3f} | {min(spans):.3f} |", flush=True)


if __name__ == "__main__":
    main()
