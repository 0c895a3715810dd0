"""config.json against what is stored and against itself: the stored values or a refusal, and bounded time for hostile values."""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5ForCausalLM

from qwen_export.errors import CheckpointError, ConfigError, QwenExportError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.tensor_names import check_tensors, has_mtp, no_draft_head
from qwen_export.graphs.config import parse_config
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from tests.support.family import FAMILY, tiny_config
from tests.support.safetensors_files import edit_json

Make = Callable[..., Path]
IDS = [5, 77, 300, 40, 18, 9, 120, 33]


def set_config(path: Path, **values: Any) -> None:
    edit_json(path / "config.json", lambda config: config.update(values))


def drop_head(path: Path) -> None:
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop("lm_head.weight", None) is not None:
            save_file(tensors, shard)
    (path / "model.safetensors.index.json").unlink(missing_ok=True)


# The LM head


def test_a_stored_head_is_used_whatever_the_flag(make_checkpoint: Make) -> None:
    path = make_checkpoint(tiny_config(vision=False), with_mtp=False)
    set_config(path, tie_word_embeddings=True)
    checkpoint = open_checkpoint(path)
    assert not checkpoint.config.text.tie_word_embeddings
    assert any("the stored head is used" in note for note in checkpoint.notes)
    theirs = Qwen3_5ForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor([IDS])).logits[0].numpy()
    got = EagerSequence(load_decoder(checkpoint), 32).read(IDS)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_a_stored_head_with_the_embeddings_values_is_the_embedding(make_checkpoint: Make) -> None:
    path = make_checkpoint(tiny_config(vision=False, tied=True), with_mtp=False)
    shard = next(path.glob("*.safetensors"))
    tensors = load_file(shard)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, shard)
    (path / "model.safetensors.index.json").unlink()
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.text.tie_word_embeddings and not checkpoint.notes
    check_tensors(checkpoint)


def test_two_flags_and_no_head(make_checkpoint: Make) -> None:
    path = make_checkpoint(tiny_config())
    drop_head(path)
    edit_json(path / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=True))
    with pytest.raises(ConfigError, match=r"two values of tie_word_embeddings"):
        open_checkpoint(path)


def test_no_flag_and_no_head(make_checkpoint: Make) -> None:
    path = make_checkpoint(tiny_config(vision=False))
    drop_head(path)
    with pytest.raises(CheckpointError, match=r"no head is stored.*tie_word_embeddings to true"):
        check_tensors(open_checkpoint(path))


# The draft head


@pytest.mark.parametrize(("level", "key"), [("", "mtp_num_hidden_layers"), ("", "num_nextn_predict_layers"), ("text_config", None)])
def test_a_stored_draft_head_is_found_wherever_it_is_announced(make_checkpoint: Make, level: str, key: str | None) -> None:
    path = make_checkpoint()

    def change(config: dict[str, Any]) -> None:
        del config["text_config"]["mtp_num_hidden_layers"]
        if key:
            (config[level] if level else config)[key] = 1

    edit_json(path / "config.json", change)
    checkpoint = open_checkpoint(path)
    assert has_mtp(checkpoint)
    assert bool(checkpoint.notes) == (key is None)


def test_why_there_is_no_draft_head(make_checkpoint: Make) -> None:
    path = make_checkpoint()
    edit_json(path / "config.json", lambda config: config["text_config"].update(mtp_num_hidden_layers=0))
    assert "set it to 1" in no_draft_head(open_checkpoint(path))
    announced = make_checkpoint(with_mtp=False)
    assert "but no tensor mtp.* is stored" in no_draft_head(open_checkpoint(announced))
    edit_json(announced / "config.json", lambda config: config["text_config"].pop("mtp_num_hidden_layers"))
    assert no_draft_head(open_checkpoint(announced)) == "the checkpoint has no draft head (mtp.*)"


# Keys


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_sliding_window", True),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("embedding_multiplier", 2.0),
        ("quantization", {"bits": 4, "group_size": 64}),
        ("per_layer_config", {"0": {"hidden_size": 8}}),
        ("a_key_that_nobody_knows", 1),
    ],
)
@pytest.mark.parametrize("vision", [False, True])
def test_keys_that_may_change_the_model(key: str, value: object, vision: bool) -> None:
    raw = copy.deepcopy(tiny_config(vision=vision))
    (raw["text_config"] if vision else raw)[key] = value
    with pytest.raises(ConfigError, match=key):
        parse_config(raw)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_sliding_window", False),
        ("sliding_window", 4096),
        ("final_logit_softcapping", None),
        ("_name_or_path", "x"),
        ("temperature", 0.7),
        ("id2label", {"0": "a"}),
        ("unsloth_fixed", True),
        ("torch_dtype", "float16"),
    ],
)
def test_keys_that_change_nothing(key: str, value: object) -> None:
    assert parse_config({**tiny_config(vision=False), key: value}).text == parse_config(tiny_config(vision=False)).text


@pytest.mark.parametrize("size", FAMILY)
def test_every_release_has_known_keys_only(size: str) -> None:
    parse_config(FAMILY[size])


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 128), ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}), ("rms_norm_eps", 1e-5)]
)
def test_the_two_levels_may_not_disagree(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{key}.*beside text_config"):
        parse_config({**tiny_config(), key: value})


def test_the_same_value_at_both_levels_is_read() -> None:
    raw = tiny_config()
    assert parse_config({**raw, "hidden_size": raw["text_config"]["hidden_size"]}).text == parse_config(raw).text


def test_stop_ids_of_both_levels_are_used() -> None:
    raw = tiny_config()
    inner = raw["text_config"]["eos_token_id"]
    assert parse_config({**raw, "eos_token_id": 7}).text.eos_token_ids == (inner, 7)


# Hostile values


HOSTILE: list[tuple[str, Any]] = [
    ("num_hidden_layers", 10**10),
    ("num_hidden_layers", 10**400),
    ("vocab_size", 10**30),
    ("hidden_size", 2**63),
    ("head_dim", 10**12),
    ("layer_types", ["full_attention"] * 100_000),
    ("max_position_embeddings", 10**300),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", float("inf")),
    ("eos_token_id", 2**70),
    ("eos_token_id", [[1]]),
    ("mtp_num_hidden_layers", 10**10),
    ("tie_word_embeddings", "\ud800"),
    ("\ud800", 1),
    ("x" * 100_000, 1),
    ("model_type", {"a": ["b"] * 10_000}),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE, ids=[f"{i}-{key[:20]!a}" for i, (key, _) in enumerate(HOSTILE)])
def test_hostile_values_give_one_short_message(make_checkpoint: Make, key: str, value: object) -> None:
    path = make_checkpoint(tiny_config(vision=False), with_mtp=False)
    edit_json(path / "config.json", lambda config: config.update({key: value}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(QwenExportError) as raised:
        open_checkpoint(path)
    message = str(raised.value)
    assert len(message) < 2000 and "\n" not in message
    message.encode()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # kilobytes


def test_experts_by_the_million() -> None:
    raw = {**tiny_config(vision=False, moe=True), "num_experts": 10**9}
    with pytest.raises(ConfigError, match="num_experts"):
        parse_config(raw)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_files_that_are_no_files(checkpoint_copy: Path, name: str) -> None:
    (checkpoint_copy / name).unlink()
    (checkpoint_copy / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"is not a file.*{name}"):
        open_checkpoint(checkpoint_copy)


def test_a_configuration_of_a_hundred_megabytes(checkpoint_copy: Path) -> None:
    with (checkpoint_copy / "config.json").open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(ConfigError, match=r"too large.*config\.json"):
        open_checkpoint(checkpoint_copy)


def test_names_that_are_no_text(checkpoint_copy: Path) -> None:
    shard = next(checkpoint_copy.glob("*.safetensors"))
    header = json.dumps({"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    shard.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="not text") as raised:
        open_checkpoint(checkpoint_copy)
    str(raised.value).encode()
