"""Every kind of `directml` bundle on DirectML, through the runtime as Windows has it, against the same bundle on the CPU provider.

No node may fall back to the CPU. A kind is a line of KINDS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qwen_export import build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.runtimes import Model, SamplingParams, load
from tests.directml.wine_machine import WineMachine, on_directml
from tests.directml.wine_server import WineServer, shared_copy
from tests.support.source_tree import ROOT
from tests.support.standard_graphs import Array

pytestmark = pytest.mark.directml

PROMPT = 'def add(a, b):\n    """Add two numbers."""\n'
GREEDY = SamplingParams(greedy=True)
NEW = 24
READ, STEPS = 100, 12


@dataclass(frozen=True)
class Kind:
    """`limit`: the largest difference of logits, as a part of their deviation."""

    name: str
    checkpoint: str
    precision: str
    limit: float


KINDS = (
    Kind("dense-fp32", "demo-dense", "fp32", 1e-4),
    Kind("dense-fp16", "demo-dense", "fp16", 0.03),
    Kind("dense-int8", "demo-dense", "int8", 0.06),
    Kind("dense-int4", "demo-dense", "int4", 0.06),
    Kind("experts-fp16", "demo-moe", "fp16", 0.03),
    Kind("experts-int4", "demo-moe", "int4", 0.06),
)


@dataclass(frozen=True)
class Bundle:
    kind: Kind
    path: Path


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    kind = request.param
    made = build(
        ROOT / "examples" / kind.checkpoint,
        tmp_path_factory.mktemp("bundles") / f"{kind.name}-{tmp_path_factory.getbasetemp().name}",
        target="directml",
        device="dml",
        precision=kind.precision,
        max_context=256,
        options=StaticOptions(64),
    )
    return Bundle(kind, shared_copy(made))


@pytest.fixture(scope="module")
def machine(server: WineServer) -> WineMachine:
    return WineMachine(server)


def logits(model: Model, ids: list[int]) -> Array:
    """f32[1 + STEPS, V]: behind a prompt of several calls, and behind each step."""
    decoder = model.decoder()
    rows = [decoder.prefill(ids[:READ]).copy()]
    return np.array(rows + [decoder.step([token])[0].copy() for token in ids[READ : READ + STEPS]])


def text(model: Model) -> str:
    return "".join(model.complete(PROMPT, sampling=GREEDY, max_new_tokens=NEW))


def test_logits_are_those_of_the_cpu(bundle: Bundle, machine: WineMachine) -> None:
    cpu = load(bundle.path, device="cpu", threads=1)
    ids = (cpu.tokenizer.encode(PROMPT) * 12)[: READ + STEPS]
    expected = logits(cpu, ids)
    with on_directml(machine, bundle.path) as model:
        found = logits(model, ids)
    difference = np.abs(found - expected).max() / expected.std()
    print(f"{bundle.kind.name}: logits differ by {np.abs(found - expected).max():.2g}, their deviation is {expected.std():.2f}")
    assert difference <= bundle.kind.limit
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("speculate", ["off", "auto", 3, "lookup"])
def test_texts_are_those_of_the_cpu(bundle: Bundle, machine: WineMachine, speculate: str | int) -> None:
    expected = text(load(bundle.path, device="cpu", threads=1, speculate=speculate))  # type: ignore[arg-type]
    with on_directml(machine, bundle.path, speculate=speculate) as model:
        assert text(model) == expected
        drafted = "verify" in machine.calls()
    assert drafted == (speculate != "off")


def test_memory_of_repeated_loads_is_flat(bundle: Bundle, machine: WineMachine) -> None:
    sizes = []
    for _ in range(6):
        with on_directml(machine, bundle.path, speculate="off") as model:
            model.decoder().prefill([1, 2, 3])
        sizes.append(machine.server.memory())
    print(f"{bundle.kind.name}: MB after each load: {[size >> 20 for size in sizes]}")
    assert not machine.sessions
    assert sizes[-1] - sizes[1] <= sum(file.stat().st_size for file in bundle.path.glob("*.weights"))
