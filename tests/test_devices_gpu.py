"""Two GPUs of one host: a model runs on the one that it was loaded for, also beside another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen_export import build
from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.memory import cuda_driver
from tests.support.gpus import gpu_count

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(greedy=True)
CODE = "import os\n\n\ndef read_lines(path):\n"


def free(device: int) -> int:
    cuda_driver.use_device(device)
    return cuda_driver.memory_info()[0]


@pytest.fixture(scope="module")
def bundle(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(demo_checkpoint, tmp_path_factory.mktemp("gpus") / "demo", device="cuda", precision="fp16")


def test_the_second_gpu_runs_what_the_first_one_runs(bundle: Path) -> None:
    if gpu_count() < 2:
        pytest.skip("one GPU")
    texts = {}
    models = {}
    for device in (0, 1):
        other = free(1 - device)
        models[device] = load(bundle, device_id=device, max_context=512, speculate=3)
        texts[device] = "".join(models[device].complete(CODE, sampling=GREEDY, max_new_tokens=48))
        assert abs(free(1 - device) - other) < 64 << 20, "nothing of it is on the other GPU"
    assert texts[0] == texts[1]
    again = {device: "".join(model.complete(CODE + "\n", sampling=GREEDY, max_new_tokens=48)) for device, model in models.items()}
    assert again[0] == again[1], "side by side in one process"
    for model in models.values():
        model.close()


def test_batches_with_drafts_on_any_gpu(bundle: Path) -> None:
    """Ragged runs, rejected drafts and joins on the last GPU give the logits that each sequence has alone, up to fp16."""
    from qwen_export.runtimes.decoding.read import Read

    device = gpu_count() - 1
    model = load(bundle, device_id=device, max_context=512)
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
