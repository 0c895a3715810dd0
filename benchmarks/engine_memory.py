"""Host memory of building and of loading engines of TensorRT, phase by phase.

    python -m benchmarks.engine_memory 4B --engine-weights stripped        # on a GPU: build, then load and refit
    python -m benchmarks.engine_memory 0.8B --layers 4 --sm 89             # without one: the build of embedded weights alone
    python -m benchmarks.engine_memory CHECKPOINT --engine-weights stripped --refit-from file

Build and load run in processes of their own, which are watched from outside every few milliseconds. `anonymous` is what the process has
allocated; `file` are pages of mapped files and libraries, which the system takes back when it needs them. `above` is what a phase adds to
what the process held after its imports. Limits: a build holds at most 1.5 times the weights of its largest engine; the stripped path, build
and load, at most 1.2 GB and the largest tensor. GB and MB are powers of ten.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen_export.building.static_plan import StaticOptions
from qwen_export.engine_options import EMBEDDED, ENGINE_WEIGHTS, STRIPPED, EngineOptions
from tests.support.family import FAMILY
from tests.support.synthesize import synthesize

ROOT = Path(__file__).resolve().parent.parent
START = "imports"
_PERIOD_S = 0.003
_FIXED = 1.2e9


@dataclass
class Phase:
    """Peaks in bytes."""

    name: str
    anonymous: int = 0
    file: int = 0
    resident: int = 0


@dataclass
class Watched:
    """Phases of a process in their order, and what it printed besides them."""

    phases: list[Phase] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def peak(self, kind: str, *, above: bool = False) -> int:
        """Of all phases behind the imports."""
        peak = max(getattr(phase, kind) for phase in self.phases[1:])
        return peak - getattr(self.phases[0], kind) if above else peak


def watch(command: Sequence[object]) -> Watched:
    """Run a command that announces its phases as lines `phase NAME`. A non-zero exit raises RuntimeError."""
    found, environment = Watched([Phase(START)]), {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)

    def sample() -> None:
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            now = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.endswith(" kB")}
            phase = found.phases[-1]
            phase.anonymous = max(phase.anonymous, now.get("RssAnon", 0))
            phase.file = max(phase.file, now.get("RssFile", 0) + now.get("RssShmem", 0))
            phase.resident = max(phase.resident, now.get("VmRSS", 0))
            time.sleep(_PERIOD_S)

    sampler = threading.Thread(target=sample)
    sampler.start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("phase "):
            found.phases.append(Phase(line.removeprefix("phase ").strip()))
        else:
            found.lines.append(line.rstrip())
    sampler.join()
    if process.wait():
        raise RuntimeError(f"{' '.join(map(str, command))} exited with {process.returncode}")
    return found


def phase(name: str) -> None:
    print(f"phase {name}", flush=True)


def build_child(arguments: argparse.Namespace, checkpoint: Path, bundle: Path) -> None:
    import qwen_export.building.emission
    import qwen_export.building.lower_graphs  # noqa: F401
    from qwen_export.building.compiler import build
    from qwen_export.runtimes.backends.tensorrt.tensorrt_library import load_library

    load_library(arguments.target)
    said = START

    def report(name: str, done: int, total: int) -> None:
        nonlocal said
        now = "weights" if total else name
        if now != said and (total or name.startswith(("compiling", "capturing"))):
            phase(now)
            said = now

    time.sleep(0.1)
    engine = EngineOptions(sms=tuple(arguments.sm.split(",")) if arguments.sm else (), weights=arguments.engine_weights)
    build(
        checkpoint,
        bundle,
        target=arguments.target,
        device="cuda",
        precision=arguments.precision,
        max_context=arguments.max_context,
        mtp=arguments.mtp,
        options=StaticOptions(arguments.chunk, None if arguments.mtp else 1),
        engine=engine,
        report=report,
    )


def load_child(arguments: argparse.Namespace, bundle: Path) -> None:
    """Library and CUDA are there before anything is measured: they are the machine's."""
    from qwen_export.manifest import load_manifest
    from qwen_export.runtimes import load
    from qwen_export.runtimes.backends.integrity import ensure_whole
    from qwen_export.runtimes.backends.tensorrt.tensorrt_engines import Engines
    from qwen_export.runtimes.backends.tensorrt.tensorrt_library import load_library
    from qwen_export.runtimes.memory import cuda_memory

    library = load_library(arguments.target)
    manifest = load_manifest(bundle)
    ensure_whole(bundle, manifest)
    runtime = library.api.Runtime(library.log)
    cuda_memory.free(cuda_memory.allocate(1 << 20))
    if arguments.refit_from == "file":
        Engines.fits_beside = staticmethod(lambda nbytes: False)  # type: ignore[method-assign]
    time.sleep(0.2)
    phase("load")
    started = time.perf_counter()
    decoder = load(bundle, speculate="off").decoder()
    loaded = time.perf_counter() - started
    phase("prompt and two steps")
    logits = [decoder.prefill(list(range(20))), *(decoder.step([token])[0] for token in (1, 2))]
    del runtime
    print(f"loaded in {loaded:.1f} s; logits are {'finite' if all(abs(row).max() < 1e6 for row in logits) else 'NOT FINITE'}")


def show(title: str, watched: Watched) -> None:
    print(title)
    base = watched.phases[0]
    for phase in watched.phases:
        held = f"RSS {phase.resident / 1e6:7.0f} MB: anonymous {phase.anonymous / 1e6:7.0f}  file {phase.file / 1e6:7.0f}"
        above = "" if phase is base else f"   above: anonymous {(phase.anonymous - base.anonymous) / 1e6:7.0f}"
        print(f"  {phase.name:22} {held}{above}")
    for line in watched.lines:
        print(f"  {line}")


def judge(what: str, got: float, limit: float) -> None:
    print(f"{'ok  ' if got <= limit else 'OVER'} {what}: {got / 1e9:.2f} GB of at most {limit / 1e9:.2f} GB")


def engine_weights(bundle: Path) -> tuple[int, int]:
    """Bytes of the weights of the largest engine, and of the largest tensor; of embedded ones the engine's file, and 0."""
    from qwen_export.manifest import load_manifest
    from qwen_export.runtimes.memory.mapped_weights import weight_bytes

    manifest = load_manifest(bundle)
    if manifest.engine is not None and manifest.engine.weights == EMBEDDED:
        return max(manifest.files[graph.file].size for graph in manifest.graphs.values()), 0
    places = [{(w.file, w.offset): weight_bytes(w) for w in graph.weights} for graph in manifest.graphs.values()]
    return max(sum(sizes.values()) for sizes in places), max(size for sizes in places for size in sizes.values())


def checkpoint_of(source: str, layers: int | None, work: Path) -> Path:
    if source not in FAMILY:
        return Path(source)
    config = json.loads(json.dumps(FAMILY[source]))
    text = config.get("text_config", config)
    if layers is not None:
        text |= {"num_hidden_layers": layers, "layer_types": text["layer_types"][:layers]}
    path = work / f"checkpoint-{source}-{layers or 'all'}"
    return path if path.exists() else synthesize(config, path, with_vision=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help=f"a directory, or a size: {', '.join(FAMILY)}")
    parser.add_argument("--target", default="tensorrt-rtx", choices=["tensorrt", "tensorrt-rtx"])
    parser.add_argument("--engine-weights", default=EMBEDDED, choices=list(ENGINE_WEIGHTS))
    parser.add_argument("--sm", help="default: the GPU that is there")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--layers", type=int, help="of a size: fewer than it has")
    parser.add_argument("--max-context", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--mtp", action="store_true", help="with drafts: six engines in the place of two")
    parser.add_argument("--refit-from", choices=["gpu", "file"], default="gpu", help="gpu: from a copy there, where it has room")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "engine-memory")
    parser.add_argument("--child", nargs=2, type=Path, metavar=("CHECKPOINT", "BUNDLE"), help=argparse.SUPPRESS)
    parser.add_argument("--loads", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        checkpoint, bundle = arguments.child
        load_child(arguments, bundle) if arguments.loads else build_child(arguments, checkpoint, bundle)
        return
    from qwen_export.building.engines import current_sm

    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint_of(arguments.checkpoint, arguments.layers, arguments.work).resolve()
    bundle = arguments.work.resolve() / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.engine_memory", *sys.argv[1:], "--child", checkpoint, bundle]
    built = watch(command)
    show(f"build, {arguments.engine_weights}", built)
    weights, largest = engine_weights(bundle)
    what = "largest engine" if arguments.engine_weights == EMBEDDED else "weights of the largest engine"
    print(f"  {what} {weights / 1e9:.2f} GB" + (f", largest tensor {largest / 1e6:.0f} MB" if largest else ""))
    loads = current_sm() is not None
    loaded = watch([*command, "--loads"]) if loads else None
    if loaded is not None:
        show(
            f"load, {arguments.engine_weights}" + (f", refit from {arguments.refit_from}" if arguments.engine_weights == STRIPPED else ""),
            loaded,
        )
    else:
        print("no GPU here: nothing was loaded")
    judge("build, anonymous above the imports", built.peak("anonymous", above=True), 1.5 * weights)
    if arguments.engine_weights == STRIPPED:
        for name, watched in (("build", built), ("load and refit", loaded)):
            if watched is not None:
                judge(f"{name}, anonymous above the imports", watched.peak("anonymous", above=True), _FIXED + largest)
                judge(f"{name}, all that is resident above the imports", watched.peak("resident", above=True), _FIXED + largest)
    shutil.rmtree(bundle)


if __name__ == "__main__":
    main()
