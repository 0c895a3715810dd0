"""generation_config.json: every key is used, has no influence, or is refused before a build; values for "off" are read as such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_export.building.text_assets import check_text_assets, copy_text_assets, stop_ids
from qwen_export.errors import CheckpointError, ParameterError, QwenExportError
from qwen_export.manifest import hash_file
from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.sampling.generation_config import KEYS, Use, read_generation_config
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.sampling.sampling_defaults import FALLBACK, RECOMMENDED, ModelFacts, recommended
from tests.support.manifests import edit_manifest

KNOWN = ModelFacts("3.5", small=False)
UNKNOWN = ModelFacts(None, small=False)
SHIPPED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
TABLE = RECOMMENDED["3.5", False, True]


def test_every_key_of_transformers_is_in_the_table() -> None:
    generation = pytest.importorskip("transformers").GenerationConfig()
    names = {name for name in vars(generation) if not name.startswith("_original")}
    assert names - {"_commit_hash"} <= set(KEYS)
    ours = {"presence_penalty", "frequency_penalty"}
    assert {name for name, key in KEYS.items() if key.use is not Use.NO_INFLUENCE} <= names | ours
    for name, value in generation._get_default_generation_params().items():
        if name != "max_length":  # 20, which transformers itself takes for no limit where the model has none
            assert read_generation_config({name: value}).unknown == ()


def test_what_the_family_does_not_ship_is_kept_beside_the_cards_values() -> None:
    file = SHIPPED | {"repetition_penalty": 1.1, "min_p": 0.05}
    got = recommended(KNOWN, True, file)
    assert (got.repetition_penalty, got.min_p) == (1.1, 0.05)
    assert (got.temperature, got.presence_penalty) == (TABLE.temperature, TABLE.presence_penalty)
    alone = recommended(KNOWN, True, {"repetition_penalty": 1.1})
    assert (alone.repetition_penalty, alone.top_k) == (1.1, TABLE.top_k)
    greedy = recommended(KNOWN, True, {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.1})
    assert greedy.is_greedy and greedy.repetition_penalty == 1.1


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ({"top_k": -1, "temperature": 0.7}, SamplingParams(temperature=0.7)),
        ({"top_k": 0, "temperature": 0.7}, SamplingParams(temperature=0.7)),
        ({"top_k": None, "temperature": 0.7}, SamplingParams(temperature=0.7)),
        ({"top_k": 50.0, "temperature": 0.7}, SamplingParams(temperature=0.7, top_k=50)),
        ({"temperature": 0.7}, SamplingParams(temperature=0.7, top_k=50)),
        ({"top_k": "40", "temperature": "0.7", "top_p": "0.9"}, SamplingParams(temperature=0.7, top_p=0.9, top_k=40)),
        ({"top_k": "-1", "temperature": 0.7}, SamplingParams(temperature=0.7)),
        ({"temperature": 0, "top_k": 5}, SamplingParams(temperature=0, top_k=5)),
        ({"temperature": None, "top_p": 0.9, "top_k": 5}, SamplingParams(top_p=0.9, top_k=5)),
        ({"min_p": None, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": []}, FALLBACK),
        ({"min_p": 0, "min_new_tokens": -1, "suppress_tokens": None}, FALLBACK),
        ({"temperature": 0.7, "top_k": 5, "presence_penalty": 0.5}, SamplingParams(temperature=0.7, top_k=5, presence_penalty=0.5)),
        ({"typical_p": 1.0, "num_beams": 1, "guidance_scale": None, "epsilon_cutoff": 0.0, "sequence_bias": []}, FALLBACK),
    ],
    ids=str,
)
def test_values_are_read_as_other_tools_write_them(file: dict[str, Any], expected: SamplingParams) -> None:
    assert recommended(UNKNOWN, True, file) == expected


def test_a_top_p_of_zero_keeps_the_likeliest_token() -> None:
    params = recommended(UNKNOWN, True, {"temperature": 1.0, "top_p": 0, "top_k": 0})
    assert list(Sampler(params).distribution(np.array([0.1, 0.3, 0.2])).ids) == [1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "warm"),
        ("temperature", True),
        ("temperature", [0.7]),
        ("temperature", float("nan")),
        ("top_p", 7),
        ("top_p", -1),
        ("top_k", 2.5),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("do_sample", "maybe"),
        ("do_sample", 7),
        ("eos_token_id", "<|im_end|>"),
        ("eos_token_id", [1, -2]),
        ("suppress_tokens", ["a"]),
        ("bad_words_ids", [3, [4]]),
        ("bad_words_ids", [[]]),
        ("max_new_tokens", 0),
        ("max_length", 1.5),
        ("stop_strings", [""]),
        ("stop_strings", 3),
        ("num_beams", 4),
        ("typical_p", 0.9),
        ("forced_eos_token_id", 8130),
        ("guidance_scale", 1.5),
        ("sequence_bias", [[[5], -2.0]]),
        ("min_length", 10),
        ("watermarking_config", {"bias": 2.0}),
    ],
)
def test_values_that_cannot_be_used_are_refused_before_a_build(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(CheckpointError, match=rf"generation_config.json, {name}\)") as caught:
        check_text_assets(tmp_path)
    assert caught.value.fix and caught.value.expected


def test_unknown_keys_are_noted(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "use_cache": False, "min_p": 0}))
    (note,) = check_text_assets(tmp_path)
    assert "chat_format" in note


def test_stop_ids_of_every_form(tmp_path: Path) -> None:
    for value, expected in ((None, (9,)), (3, (3, 9)), ([3, 4.0], (3, 4, 9)), ([], (9,)), (9, (9,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert stop_ids(tmp_path, (9,)) == expected


def test_limits_of_an_answer() -> None:
    assert read_generation_config({}).new_tokens(5, None) is None
    assert read_generation_config({"max_new_tokens": 7, "max_length": 6}).new_tokens(5, None) == 7
    assert read_generation_config({"max_length": 20}).new_tokens(5, None) == 15
    assert read_generation_config({"max_new_tokens": 7}).new_tokens(5, 3) == 3
    with pytest.raises(ParameterError, match="max_length 20"):
        read_generation_config({"max_length": 20}).new_tokens(20, None)
    for wanted in (0, -1, 1.5, True):
        with pytest.raises(ParameterError, match="number of new tokens"):
            read_generation_config({}).new_tokens(5, wanted)  # type: ignore[arg-type]


def with_settings(bundle: Path, **settings: Any) -> Path:
    """The bundle as it would be built from a checkpoint with these settings."""
    (bundle / "generation_config.json").write_text(json.dumps(settings))
    entry = hash_file(bundle / "generation_config.json")
    listed = {"generation_config.json": {"size": entry.size, "sha256": entry.sha256}}
    edit_manifest(bundle, lambda manifest: manifest["files"].update(listed))
    return bundle


CODE = "def read_lines(path):\n    with open(path) as file:\n"


def test_a_bundle_follows_its_settings_with_drafts_and_without(demo_bundle_copy: Path) -> None:
    plain = load(demo_bundle_copy, speculate="off")
    free = list(plain.complete(CODE, sampling=SamplingParams(greedy=True), max_new_tokens=40))
    words = plain.tokenizer.encode("".join(free))
    settings: dict[str, Any] = {
        "do_sample": False,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [words[3]],
        "begin_suppress_tokens": [words[0]],
        "bad_words_ids": [[words[5]], words[8:10]],
        "max_new_tokens": 40,
    }
    bundle = with_settings(demo_bundle_copy, **settings)
    answers = []
    for speculate in ("off", 3, "auto"):
        model = load(bundle, speculate=speculate)
        answer = model.complete(CODE)
        list(answer)
        answers.append(answer.tokens)
        assert answer.statistics.finish in ("length", "stop") and len(answer.tokens) <= 40
    assert answers[0] == answers[1] == answers[2]
    tokens = answers[0]
    assert tokens[0] != words[0] and words[3] not in tokens and words[5] not in tokens
    assert list(words[8:10]) not in [tokens[i : i + 2] for i in range(len(tokens))]
    text = [*model.tokenizer.encode(CODE), *tokens]
    grams = [tuple(text[i : i + 3]) for i in range(len(text) - 2)]
    new = grams[len(text) - len(tokens) - 2 :]
    assert all(grams.count(gram) == 1 for gram in new)


def test_stop_strings_and_lengths_of_the_settings_yield_to_the_callers(demo_bundle_copy: Path) -> None:
    free = "".join(load(demo_bundle_copy, speculate="off").complete(CODE, sampling=SamplingParams(greedy=True), max_new_tokens=30))
    stop = free[10:13]
    model = load(with_settings(demo_bundle_copy, do_sample=False, stop_strings=stop, max_new_tokens=30), speculate="off")
    answer = model.complete(CODE)
    assert "".join(answer) == free[: free.index(stop)] and answer.statistics.finish == "stop"
    assert "".join(model.complete(CODE, stop=())) == free
    assert model.complete(CODE, stop=(), max_new_tokens=4).tokens == []
    short = model.complete(CODE, stop=(), max_new_tokens=4)
    list(short)
    assert len(short.tokens) == 4


def test_a_least_length_keeps_the_stop_tokens_away(demo_bundle_copy: Path) -> None:
    messages = [{"role": "user", "content": "What does the function os.path.join do?"}]
    model = load(demo_bundle_copy, speculate=2)
    free = model.stream(messages, enable_thinking=False, sampling=SamplingParams(greedy=True), max_new_tokens=200)
    list(free)
    assert free.statistics.finish == "stop"
    least = len(free.tokens) + 5
    longer = model.stream(
        messages, enable_thinking=False, sampling=SamplingParams(greedy=True, min_new_tokens=least), max_new_tokens=least + 100
    )
    list(longer)
    assert len(longer.tokens) >= least and longer.tokens[: len(free.tokens)] == free.tokens


def test_an_older_bundle_with_a_bad_value_is_one_message(demo_bundle_copy: Path) -> None:
    model = load(with_settings(demo_bundle_copy, top_p=7), speculate="off")
    with pytest.raises(QwenExportError, match=r"generation_config.json, top_p"):
        model.complete("a")


def test_settings_are_copied_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "checkpoint" / "generation_config.json").write_text('{"top_k": 50.0}')
    assert copy_text_assets(tmp_path / "checkpoint", tmp_path / "bundle") == ["generation_config.json"]
    assert (tmp_path / "bundle" / "generation_config.json").read_text() == '{"top_k": 50.0}'
