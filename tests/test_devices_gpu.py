"""Two GPUs of one host: a model runs on the one that it was loaded for, also beside another one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwen_export import build
from qwen_export.bundle_contract import LAST_SLOT
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.read import Read
from tests.support.gpus import gpu_count

pytestmark = pytest.mark.gpu
CODE = "import os\n\n\ndef read_lines(path):\n"


@pytest.fixture(scope="module")
def bundle(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(demo_checkpoint, tmp_path_factory.mktemp("gpus") / "demo", device="cuda", precision="fp16")


ANSWER = """
import json, sys
from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.memory import cuda_driver

def free(device):
    cuda_driver.use_device(device)
    return cuda_driver.memory_info()[0]

device, other = int(sys.argv[2]), 1 - int(sys.argv[2])
before = [free(0), free(1)]
model = load(sys.argv[1], device_id=device, max_context=512, speculate=3)
text = "".join(model.complete(sys.argv[3], sampling=SamplingParams(greedy=True), max_new_tokens=48))
used = {d: before[d] - free(d) for d in (device, other)}
try:
    load(sys.argv[1], device_id=other)
    second = ""
except Exception as error:
    second = str(error)
print(json.dumps({"text": text, "own": used[device], "other": used[other], "second": second}))
"""


def test_the_second_gpu_runs_what_the_first_one_runs(bundle: Path) -> None:
    """In processes of their own; ONNX Runtime's attention takes one GPU per process, which a second `load` is told."""
    if gpu_count() < 2:
        pytest.skip("one GPU")
    answers = []
    for device in (0, 1):
        command = [sys.executable, "-c", ANSWER, str(bundle), str(device), CODE]
        answers.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
    assert answers[0]["text"] == answers[1]["text"] != ""
    assert all(answer["own"] > 64 << 20 > abs(answer["other"]) for answer in answers), "nothing of it is on the other GPU"
    assert all("one GPU per process" in answer["second"] for answer in answers)


def test_batches_with_drafts(bundle: Path) -> None:
    """Ragged runs, rejected drafts and joins give the logits that each sequence has alone, up to fp16."""
    model = load(bundle, max_context=512)
    together, alone = model.decoder(3, drafts=True), [model.decoder(drafts=True) for _ in range(3)]
    prompts = [[5, 6, 7, 8], list(range(20, 60)), [9]]
    script: list[list[Read]] = [
        [Read(slot, ids) for slot, ids in enumerate(prompts)],
        [Read(slot, [11 + slot]) for slot in range(3)],
        [Read(0, [3, 4, 5], commit=False, logits=3), Read(2, [6, 7], commit=False, logits=2), Read(1, [8])],
        [Read(2, [1]), Read(0, [2])],
        [Read(slot, [31]) for slot in range(3)],
    ]
    for reads in script:
        got = [rows.array[: read.logits].copy() for read, rows in zip(reads, together.run(reads), strict=True)]
        for read, rows in zip(reads, got, strict=True):
            single = Read(0, read.ids, commit=read.commit, logits=read.logits)
            [expected] = alone[read.slot].run([single])
            np.testing.assert_allclose(rows, expected.array[: read.logits], atol=0.05)
            if not read.commit:
                together.accept(1, read.slot)
                alone[read.slot].accept(1)
    other = model.decoder(3, drafts=True)
    other.restore(together.snapshot(1), 2)
    np.testing.assert_allclose(other.run([Read(2, [40])])[0].array, together.run([Read(1, [40])])[0].array, atol=0.05)


@pytest.mark.parametrize("devices", [[0], [0, 1]], ids=str)
@pytest.mark.parametrize("stages", [2, 4])
def test_stages_give_the_logits_of_one_graph(demo_checkpoint: Path, bundle: Path, tmp_path: Path, stages: int, devices: list[int]) -> None:
    """On one GPU and on two; a prompt of several pieces, steps of a batch, drafts."""
    if gpu_count() < len(devices):
        pytest.skip("one GPU")
    cut = build(demo_checkpoint, tmp_path / "stages", device="cuda", precision="fp16", stages=stages)
    if any(tensor.name == LAST_SLOT for tensor in load_manifest(cut).graphs["mtp"].inputs):
        pytest.skip("the attention of this bundle takes one GPU")
    prompt = np.random.default_rng(1).integers(0, 4000, 3000).tolist()

    def logits(path: Path, places: list[int]) -> list[np.ndarray]:
        with load(path, devices=places, max_context=4096, speculate=3) as model:
            decoder = model.decoder(2, drafts=True)
            # The same pieces in both: products of other sizes round differently.
            parts = [prompt[at : at + 1024] for at in range(0, 3000, 1024)]
            if len(places) > 1:
                seen = [decoder.prefill(prompt, 0).copy()]
            else:
                for part in parts[:-1]:
                    decoder.prefill(part, 0, want_logits=False)
                seen = [decoder.prefill(parts[-1], 0).copy()]
            decoder.prefill(prompt[:5], 1)
            seen.append(decoder.verify(prompt[:4], 0).array.copy())
            decoder.accept(3, 0)
            seen.append(decoder.step([1, 2]).array.copy())
            return seen

    for have, want in zip(logits(cut, devices), logits(bundle, []), strict=True):
        np.testing.assert_array_equal(have, want)
