"""Bundles that read pictures on DirectML: towers of fixed sizes and prompts with their rows, against the same bundle on the CPU provider.

Small random checkpoints, dense and with experts: the demos have no tower. A random router has near-ties, and which expert wins one in
fp16 is rounding; so in fp16 every expert is chosen, and in fp32 two of eight.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_export import build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.runtimes import load
from qwen_export.runtimes.model import Model
from tests.directml.wine_machine import WineMachine, on_directml
from tests.directml.wine_server import WineServer, shared_copy
from tests.support.standard_graphs import Array
from tests.support.synthesize import synthesize
from tests.support.tiny_tokenizer import write_tiny_tokenizer
from tests.test_picture_parity import Subject, tiny
from tests.test_portable_pictures import read

pytestmark = pytest.mark.directml

SIZES = (8, 64)
LOADS = 4
EXPERTS = 8


@dataclass(frozen=True)
class Kind:
    """`limit`: the largest difference, as a part of the deviation. `chosen` experts of eight for each token; 0: dense."""

    name: str
    chosen: int
    precision: str
    limit: float

    def config(self) -> dict[str, Any]:
        config = tiny(moe=self.chosen > 0)
        if self.chosen:
            config["text_config"]["num_experts_per_tok"] = self.chosen
            assert config["text_config"]["num_experts"] == EXPERTS
        return config


KINDS = (
    Kind("pictures-fp32", 0, "fp32", 1e-4),
    Kind("pictures-fp16", 0, "fp16", 0.03),
    Kind("pictures-experts-fp32", 2, "fp32", 1e-4),
    Kind("pictures-experts-fp16", EXPERTS, "fp16", 0.03),
    Kind("pictures-int8", 0, "int8", 0.06),
)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, Path]:
    kind = request.param
    directory = tmp_path_factory.mktemp(kind.name)
    checkpoint = synthesize(kind.config(), directory / "checkpoint", tokenizer=write_tiny_tokenizer(directory / "tokenizer"))
    made = build(
        checkpoint,
        directory / f"{kind.name}-{tmp_path_factory.getbasetemp().name}",
        target="directml",
        device="dml",
        precision=kind.precision,
        max_context=160,
        options=StaticOptions(16, picture_tokens=SIZES),
    )
    return kind, shared_copy(made)


@pytest.fixture(scope="module")
def machine(server: WineServer) -> WineMachine:
    return WineMachine(server)


def seen(model: Model) -> dict[str, Array]:
    """Rows of a picture from the smallest tower and from the next, filled up; logits behind a prompt with both and of a step."""
    subject = Subject(Path(), None, model)
    pictures = subject.pictures((64, 64), (96, 160))
    assert model.sight is not None
    rows = {f"tower {i}": model.sight.encoder.features(one) for i, one in enumerate(pictures)}
    found = {name: one.view(np.float16 if one.itemsize == 2 else one.dtype).copy() for name, one in rows.items()}
    prompt = subject.prompt([4, pictures[0], 3, pictures[1], 8])
    decoder = model.decoder()
    found["prompt"] = read(decoder, prompt, [9])
    found["step"] = decoder.step([11])[0].copy()
    return found


def test_towers_and_prompts_are_those_of_the_cpu(bundle: tuple[Kind, Path], machine: WineMachine) -> None:
    kind, path = bundle
    expected = seen(load(path, device="cpu", threads=1, speculate="off"))
    with on_directml(machine, path, speculate="off") as model:
        found = seen(model)
        assert {"vision_8", "vision_64"} <= set(machine.calls())
    for name, want in expected.items():
        difference = float(np.abs(found[name].astype(np.float32) - want.astype(np.float32)).max())
        print(f"{kind.name}: {name} differs by {difference:.2g}, its deviation is {want.std():.2g}")
        assert difference <= kind.limit * float(want.astype(np.float32).std())


def test_memory_of_repeated_loads_is_flat(bundle: tuple[Kind, Path], machine: WineMachine) -> None:
    kind, path = bundle
    sizes = []
    for _ in range(LOADS):
        with on_directml(machine, path, speculate="off") as model:
            subject = Subject(Path(), None, model)
            assert model.sight is not None
            model.sight.encoder.features(*subject.pictures((64, 64)))
        sizes.append(machine.server.memory())
    print(f"{kind.name}: MB after each load: {[size >> 20 for size in sizes]}")
    assert sizes[-1] - sizes[1] <= 16 << 20
