"""The vision tower on CUDA against the eager one, and prompts with pictures: what the CPU tests assert, in the types of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qwen_export import build
from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.memory.buffers import as_bytes, decode
from qwen_export.runtimes.memory.cuda_driver import memory_info
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.vision.chat_media import MediaOptions
from qwen_export.runtimes.vision.picture import made_picture
from qwen_export.verification.layer_check import verify_layers
from qwen_export.verification.logit_check import verify
from tests.support.family import FAMILY, tiny_config
from tests.support.pictures import noise, photo
from tests.support.synthesize import synthesize
from tests.support.tiny_tokenizer import write_tiny_tokenizer

pytestmark = pytest.mark.gpu
SMALL = MediaOptions(min_pixels=32 * 32, max_pixels=96 * 96)
TOWERS = {name: FAMILY[name]["vision_config"] for name in ("0.8B", "4B", "27B")}


@pytest.fixture(scope="module", params=["fp16", "bf16", "fp32"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sees")
    config = tiny_config(linear_key_head_dim=128, linear_value_head_dim=128)
    return synthesize(config, directory / "checkpoint", tokenizer=write_tiny_tokenizer(directory / "tokenizer"))


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, precision: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if precision == "fp32":
        pytest.skip("attention of the decoder takes no fp32 on CUDA")
    return build(checkpoint, tmp_path_factory.mktemp("bundles") / precision, device="cuda", precision=precision, vision=True)


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Model]:
    with load(bundle) as loaded:
        yield loaded


def test_pictures_pass_verify(bundle: Path, checkpoint: Path) -> None:
    assert verify(bundle, checkpoint)["passed"]
    result = verify_layers(bundle, checkpoint)
    assert result["passed"] and [row for row in result["layers"] if row["kind"] == "vision"]


@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_the_family(tmp_path: Path, name: str, precision: str) -> None:
    """Widths and heads as released, of which 72 is no power of two; two blocks, over a small decoder."""
    if precision == "fp32":
        pytest.skip("attention of the decoder takes no fp32 on CUDA")
    config = tiny_config(linear_key_head_dim=128, linear_value_head_dim=128)
    config["vision_config"] = {**TOWERS[name], "depth": 2, "out_hidden_size": config["text_config"]["hidden_size"]}
    checkpoint = synthesize(config, tmp_path / "checkpoint", with_mtp=False)
    result = verify_layers(build(checkpoint, tmp_path / "bundle", device="cuda", precision=precision, vision=True), checkpoint)
    assert result["passed"], [row for row in result["layers"] if row["passed"] is False]


def test_answers_with_pictures_and_drafts(model: Model) -> None:
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": photo(64, 96, seed)}, {"type": "text", "text": "?"}]}]
        for seed in (1, 2, 1)
    ]
    prepared = [model.prepare_chat(chat, sampling=SamplingParams(greedy=True), max_new_tokens=16, media=SMALL) for chat in chats]
    with Engine.of(model, 3) as engine:
        answers = [list(stream) for stream in [engine.submit(one.request) for one in prepared]]
    assert answers[0] == answers[2] and all(len(answer) == 16 for answer in answers)


def test_text_only_calls_are_recorded_with_no_features(model: Model) -> None:
    """A step of a decoder that sees has an input of no rows."""
    decoder = model.decoder()
    decoder.prefill([1, 2, 3])
    first = [decoder.step([4])[0].copy() for _ in range(4)]
    decoder.reset()
    decoder.prefill([1, 2, 3])
    again = [decoder.step([4])[0].copy() for _ in range(4)]
    np.testing.assert_array_equal(first, again)


def test_attention_is_not_materialized(model: Model) -> None:
    """Scores of all heads of 16384 patches would be gigabytes."""
    assert model.sight is not None
    encoder = model.sight.encoder
    encoder.features(made_picture(noise(64, 64)[None], model.sight.spec))
    free = memory_info()[0]
    made = encoder.features(made_picture(noise(2048, 2048)[None], model.sight.spec))
    assert free - memory_info()[0] < 1 << 30
    dtype = model.manifest.graphs["vision"].outputs[0].dtype
    assert np.isfinite(decode(as_bytes(made), dtype, made.shape)).all()
