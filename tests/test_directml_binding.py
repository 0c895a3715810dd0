"""What the runtime asks of onnxruntime-directml, call by call: its module is replaced by one that computes on the CPU provider and writes
down what it was asked. The same module over DirectML itself is in tests/directml."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from qwen_export import build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import SamplingParams, load
from tests.support.directml_binding import PROVIDER, CpuMachine, DirectmlBinding
from tests.support.source_tree import ROOT
from tests.support.static_bundles import steps_around_a_snapshot

GREEDY = SamplingParams(greedy=True)
PROMPT = "import os\nimport os\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("directml") / "bundle"
    return build(
        ROOT / "examples" / "demo-dense",
        output,
        target="directml",
        device="dml",
        precision="fp16",
        max_context=128,
        options=StaticOptions(16),
    )


@pytest.fixture
def binding() -> DirectmlBinding:
    return DirectmlBinding(CpuMachine())


def test_a_session_is_opened_as_the_provider_demands(bundle: Path, binding: DirectmlBinding) -> None:
    with binding.installed():
        load(bundle, speculate="off", device_id=1)
    assert {session.graph for session in binding.opened} >= {"decoder", "prefill"}
    for session in binding.opened:
        assert session.providers == ((PROVIDER, {"device_id": "1"}), "CPUExecutionProvider")
        assert session.settings["enable_mem_pattern"] is False, "the provider refuses sessions with plans of memory"
        assert session.settings["execution_mode"] == ort.ExecutionMode.ORT_SEQUENTIAL, "the provider refuses parallel execution"
        assert "session.use_env_allocators" not in session.entries, "that is for the arena of the CPU"


def test_values_are_bound_once_and_on_the_device(bundle: Path, binding: DirectmlBinding) -> None:
    """Its memory has no address: whatever is bound is a value. Steps take turns of two sets of states, so a graph is bound twice."""
    with binding.installed():
        machine = load(bundle, speculate="off").decoder()
        machine.prefill(list(range(40)))
        for token in range(6):
            machine.step([token])
    assert binding.devices == {("dml", 0)}
    graphs, counts = load_manifest(bundle).graphs, Counter(binding.bound)
    for name in ("decoder", "prefill"):
        signature = {("input", t.name) for t in graphs[name].inputs} | {("output", t.name) for t in graphs[name].outputs}
        assert {(direction, value) for graph, direction, value in counts if graph == name} == signature
        assert {count for (graph, _, _), count in counts.items() if graph == name} <= {1, 2}


@pytest.mark.parametrize("speculate", [3, "lookup"])
def test_the_text_is_that_of_the_cpu(bundle: Path, binding: DirectmlBinding, speculate: str | int) -> None:
    def text(**options: object) -> str:
        model = load(bundle, speculate=speculate, **options)  # type: ignore[arg-type]
        return "".join(model.complete(PROMPT, sampling=GREEDY, max_new_tokens=8))

    with binding.installed():
        found = text()
    assert found == text(device="cpu", threads=1)


def test_states_go_back_and_come_again(bundle: Path, binding: DirectmlBinding) -> None:
    """Snapshots and marks read and write parts of values that the device gives whole."""
    with binding.installed():
        first, again = steps_around_a_snapshot(load(bundle, speculate="off").decoder(), list(range(5, 45)))
        assert np.array_equal(again, first)
