"""Where the time of a compiled graph goes: per kernel, as a recorded CUDA graph, and on the host.

    python benchmarks/tensorrt_profile.py BUNDLE [--graph decoder] [--length 2000] [--top 25]       on the GPU the bundle is for
    python benchmarks/tensorrt_profile.py BUNDLE --kernels                                          anywhere, TensorRT-RTX engines

Kernel times come from TensorRT's own profiler, one launch after the other, the median of several runs: their sum is more than the recorded
graph takes, which overlaps launches. `recorded` is the median of single replays between two events; `back to back` is many replays in a
row, divided; `host` is what a call takes on the host besides. `--kernels` reads the engine's file instead: launches and their sizes.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_export.manifest import file_path, load_manifest
from qwen_export.runtimes.backends.open_graphs import OpenOptions, open_backend
from qwen_export.runtimes.decoding.static_graphs import StaticGraph, StaticStates, rotary_tables
from qwen_export.runtimes.memory.cuda_driver import driver
from qwen_export.runtimes.memory.cuda_stream import Stream
from tests.support.engine_program import EVENTS, read_program

# What a kernel is, by the first pattern that its name has.
KINDS = (
    ("attention", "mha|attention|fmha"),
    ("top-k", "Topk|TopK"),
    ("product, LM head", r"head\.Gemm|lm_head"),
    ("product, attention", r"self_attn\.MatMul"),
    ("product, recurrence", r"linear_attn\.MatMul"),
    ("product", "Gemm|MatMul|gemm|proj"),
    ("copy", r"^__myl_(?:Tran|Resh|Move|Cast|Slic|Conc)+_|[Rr]eformat|[Cc]opy"),
    ("generated", "^__myl"),
)


class Events:
    """Two events of the driver around what a stream does between them."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._driver = stream, driver()
        self._events = [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in self._events:
            self._driver.cuEventCreate(ctypes.byref(event), 0)

    def milliseconds(self, work: Callable[[], None]) -> float:
        begin, end = self._events
        self._driver.cuEventRecord(begin, ctypes.c_void_p(self._stream.handle))
        work()
        self._driver.cuEventRecord(end, ctypes.c_void_p(self._stream.handle))
        self._stream.synchronize()
        taken = ctypes.c_float()
        self._driver.cuEventElapsedTime(ctypes.byref(taken), begin, end)
        return taken.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--graph", default="decoder", help="which of the bundle's graphs")
    parser.add_argument("--length", type=int, default=2000, help="tokens that were read before")
    parser.add_argument("--top", type=int, default=25, help="lines of the table of kernels")
    parser.add_argument("--runs", type=int, default=20, help="runs with the profiler")
    parser.add_argument("--kernels", action="store_true", help="what the engine's file says that it launches; needs no GPU")
    arguments = parser.parse_args()
    manifest = load_manifest(arguments.bundle)
    if arguments.kernels:
        print_kernels(file_path(arguments.bundle, manifest.graphs[arguments.graph].file))
        return
    sessions = open_backend(arguments.bundle, manifest, OpenOptions())
    session = sessions(arguments.graph)
    graph = StaticGraph(session)
    length = min(arguments.length, manifest.max_context - graph.T)
    graph.set(input_ids=[1] * graph.T, length=[length], accepted=[0], commit=[graph.T], logit_rows=[0])
    states = StaticStates({arguments.graph: graph}, rotary_tables(manifest, session))
    print(f"{arguments.graph}: {graph.T} tokens after {length}")
    whole_call(session, lambda: states.run(arguments.graph))
    kernels(session, states, graph, arguments)


def whole_call(session: Any, run: Callable[[], None]) -> None:
    """Times of the call as the runtime makes it."""
    first = time.perf_counter()
    for _ in range(4):  # both sets of buffers: the first run compiles, the second records
        run()
    print(f"first four calls {time.perf_counter() - first:.2f} s")
    stream = session.engine.engines.stream
    host = []
    for _ in range(200):
        begin = time.perf_counter()
        run()
        host.append((time.perf_counter() - begin) * 1e3)
    recordings = [context.recording for context in session.engine._contexts if context.recording is not None]
    if not recordings:
        print(f"call {statistics.median(host):.4f} ms; it is not recorded: launched kernel by kernel")
        return
    events, recording = Events(stream), recordings[0]
    single = statistics.median(events.milliseconds(recording.launch) for _ in range(200))

    def many() -> None:
        for _ in range(100):
            recording.launch()

    row = min(events.milliseconds(many) for _ in range(3)) / 100
    call = statistics.median(host)
    print(f"recorded {single:.4f} ms, back to back {row:.4f} ms, call {call:.4f} ms, of which host {call - single:.4f} ms")


def kernels(session: Any, states: StaticStates, graph: StaticGraph, arguments: argparse.Namespace) -> None:
    """Times per kernel, from a context of its own with a profiler."""
    api, stream = session.engine.engines.library.api, session.engine.engines.stream
    times: dict[str, list[float]] = defaultdict(list)

    class Profiler(api.IProfiler):
        def __init__(self) -> None:
            api.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name].append(ms)

    profiler, context = Profiler(), states._bind(graph)._bound_context()
    context.native.profiler = profiler
    context.native.enqueue_emits_profile = True
    for _ in range(arguments.runs):
        context.queue()
        stream.synchronize()
    context.native.profiler = None
    # A name that comes several times in one run counts as often.
    total = {name: statistics.median(each) * len(each) / arguments.runs * 1e3 for name, each in times.items()}
    count = {name: len(each) / arguments.runs for name, each in times.items()}
    everything = sum(total.values())
    if not everything:
        print("the profiler reported nothing")
        return
    print(f"\n{sum(count.values()):.0f} kernels, {everything:.1f} us one after the other")
    _table(total, count, kind_of, everything, len(KINDS) + 1)
    print()
    _table(total, count, pattern_of, everything, arguments.top)


def _table(total: dict[str, float], count: dict[str, float], group: Callable[[str], str], everything: float, rows: int) -> None:
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, microseconds in total.items():
        sums[group(name)] += microseconds  # type: ignore[assignment]
        counts[group(name)] += count[name]  # type: ignore[assignment]
    print("|       us |     % |     n | us each | |\n|---|---|---|---|---|")
    for label, microseconds in sums.most_common(rows):
        n = counts[label]
        print(f"| {microseconds:8.1f} | {microseconds / everything:5.1%} | {n:5.0f} | {microseconds / n:7.2f} | {label[:130]} |")


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def pattern_of(name: str) -> str:
    """The name without what tells layers apart."""
    return re.sub(r"_myl\d+_\d+$", "", re.sub(r"_0x[0-9a-f]{16,}", "", re.sub(r"layers\.\d+\.", "layers.*.", name)))


def print_kernels(engine: Path) -> None:
    calls = read_program(engine)
    print("| blocks | threads | kernel | writes |\n|---|---|---|---|")
    for call in calls:
        if call.kind not in EVENTS:
            print(f"| {call.blocks or ''} | {call.threads or ''} | {call.name[:100]} | {' '.join(call.outputs)[:100]} |")
    print(", ".join(f"{count} {kind}" for kind, count in Counter(call.kind for call in calls).items()))


if __name__ == "__main__":
    main()
