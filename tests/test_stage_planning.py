"""How many stages a build has when nobody says, and what `inspect` and `check` say of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.stage_plan import StageCosts
from qwen_export.bundles.inspection import inspect_checkpoint
from qwen_export.commands.stage_check import check_stages
from qwen_export.errors import BundleError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.manifest import Manifest, load_manifest
from qwen_export.runtimes.backends.compatibility import for_device
from qwen_export.runtimes.backends.stage_memory import GPU_WORKSPACE, needed_by_stage
from qwen_export.runtimes.memory.device import Device
from tests.support.fake_driver import FakeDriver
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize

CONTEXT, LAYERS = 64, 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tiny_config(vision=False, layers=LAYERS), tmp_path_factory.mktemp("planning") / "checkpoint")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return build(checkpoint, checkpoint.parent / "bundle", stages=4, mtp=False, max_context=CONTEXT)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.lists(st.integers(0, 9), min_size=8, max_size=8), st.integers(1, 250))
def test_as_few_stages_as_fit(weights: list[int], sequence: list[int], memory: int) -> None:
    costs = StageCosts(weights, sequence[: len(weights)], first=5, last=7, last_sequence=2)

    def largest(count: int) -> int:
        return max(stage.gpu_bytes for stage in costs.cut(count))

    stages = costs.fitting(memory + GPU_WORKSPACE)
    if stages is None:
        assert largest(len(weights)) > memory + GPU_WORKSPACE
        return
    assert sum(stage.layers for stage in stages) == len(weights)
    assert sum(stage.weight_bytes + stage.sequence_bytes for stage in stages) == sum(weights) + sum(sequence[: len(weights)]) + 14
    assert largest(len(stages)) <= memory + GPU_WORKSPACE
    assert len(stages) == 1 or largest(len(stages) - 1) > memory + GPU_WORKSPACE


def test_the_number_of_stages_follows_the_memory_of_the_gpus(checkpoint: Path) -> None:
    source = open_checkpoint(checkpoint)
    whole = plan_build(source, device="cuda", precision="bf16")
    [stage] = whole.stages
    assert stage.weight_bytes == whole.bundle_bytes
    assert stage.sequence_bytes == whole.state_bytes + whole.max_context * whole.cache_bytes_per_token
    # Without the draft head, whose embedding is that of the first stage once more.
    memory = GPU_WORKSPACE + (stage.gpu_bytes - GPU_WORKSPACE) * 2 // 3
    assert len(plan_build(source, device="cuda", precision="bf16", device_memory=stage.gpu_bytes).stages) == 1
    assert len(plan_build(source, device="cuda", precision="bf16", mtp=False, device_memory=memory).stages) == 2
    assert len(plan_build(source, device="cuda", precision="bf16", device_memory=1).stages) == 1, "no number would do"
    assert len(plan_build(source, device="cuda", precision="bf16", stages=3, device_memory=memory).stages) == 3
    assert len(plan_build(source, device_memory=memory).stages) == 1, "the CPU has its memory as a whole"


def test_inspect_tells_stages(checkpoint: Path) -> None:
    whole = plan_build(open_checkpoint(checkpoint), device="cuda", precision="bf16")
    memory = GPU_WORKSPACE + (whole.stages[0].gpu_bytes - GPU_WORKSPACE) * 3 // 4
    report = inspect_checkpoint(checkpoint, targets=["onnxruntime"], device_memory=memory)
    stages = {(entry["device"], entry["precision"]): entry["stages"] for entry in report["targets"] if entry["supported"]}
    assert len(stages["cpu", "fp32"]) == 1
    assert len(stages["cuda", "bf16"]) > 1
    assert stages["cuda", "bf16"][0]["first_layer"] == 0
    assert stages["cuda", "bf16"][-1]["last_layer"] == LAYERS - 1
    assert all(stage["gpu_bytes"] <= memory for stage in stages["cuda", "bf16"])


def on_gpus(bundle: Path) -> tuple[Manifest, list[int]]:
    manifest = for_device(load_manifest(bundle), "cuda")
    return manifest, needed_by_stage(manifest)


def test_check_says_which_gpus_are_missing(bundle: Path, driver: FakeDriver) -> None:
    manifest, needs = on_gpus(bundle)
    driver.devices, driver.memory = 2, sum(needs) + GPU_WORKSPACE
    placed, free = check_stages(bundle, manifest, [0, 1])
    assert placed == {Device("cuda", n): needs[2 * n] + needs[2 * n + 1] + GPU_WORKSPACE for n in (0, 1)}
    assert set(free.values()) == {driver.memory}
    with pytest.raises(BundleError, match=r"too few GPUs.*Give.*0\."):
        check_stages(bundle, manifest, [0, 1, 2])
    driver.memory = max(placed.values())
    with pytest.raises(BundleError, match=r"too little free memory.*Give.*0,1\."):
        check_stages(bundle, manifest, [0])
    driver.memory = max(needs) + GPU_WORKSPACE
    with pytest.raises(BundleError, match=r"2 of 4 GPUs are missing, with at least"):
        check_stages(bundle, manifest, [0, 1])
    driver.memory -= 1
    with pytest.raises(BundleError, match=r"All 4 GPUs are missing.*more.*stages"):
        check_stages(bundle, manifest, [0, 1])
