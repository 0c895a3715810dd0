"""The two trained demo checkpoints: layout, checksums, tokenizer, chat format, and that transformers writes sensible code with them."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("demo-dense", "demo-moe")
MAX_BYTES = {"demo-dense": 16_000_000, "demo-moe": 24_000_000}

both = pytest.mark.parametrize("name", NAMES)


@cache
def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(EXAMPLES / name)


@cache
def load_model(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(EXAMPLES / name, dtype=torch.float32).eval()


@cache
def header(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every stored tensor's dtype and shape."""
    tensors = {}
    for file in sorted((EXAMPLES / name).glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                part = handle.get_slice(key)
                tensors[key] = (part.get_dtype(), tuple(part.get_shape()))
    return tensors


def config(name: str) -> dict[str, Any]:
    return json.loads((EXAMPLES / name / "config.json").read_text())


def chat(messages: list[dict[str, Any]], name: str = "demo-dense", **flags: Any) -> str:
    return load_tokenizer(name).apply_chat_template(messages, tokenize=False, **flags)


@both
def test_files_match_their_checksums_and_the_size_limit(name: str) -> None:
    directory = EXAMPLES / name
    listed = dict(reversed(line.split()) for line in (directory / "SHA256SUMS").read_text().splitlines())
    present = {p.name for p in directory.iterdir() if p.name != "SHA256SUMS"}
    assert set(listed) == present
    assert {p: hashlib.sha256((directory / p).read_bytes()).hexdigest() for p in present} == listed
    assert sum(p.stat().st_size for p in directory.iterdir()) <= MAX_BYTES[name]


@both
def test_all_tensors_are_bf16_and_counted_as_in_the_released_layout(name: str) -> None:
    tensors = header(name)
    assert {dtype for dtype, _ in tensors.values()} == {"BF16"}
    moe = "num_experts" in config(name)
    linear, full = (18, 15) if moe else (14, 11)
    main = [k for k in tensors if k.startswith("model.")]
    draft = [k for k in tensors if k.startswith("mtp.")]
    assert len(main) == 6 * linear + 2 * full + 2
    assert len(draft) == full + 4
    assert len(main) + len(draft) == len(tensors), "a tied model stores no lm_head.weight"


def test_weight_index_names_the_shard_of_every_tensor() -> None:
    index = json.loads((EXAMPLES / "demo-moe" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(header("demo-moe"))
    for file in set(index["weight_map"].values()):
        with safe_open(EXAMPLES / "demo-moe" / file, "pt") as handle:
            assert set(handle.keys()) == {k for k, f in index["weight_map"].items() if f == file}


@both
def test_shapes_follow_the_config(name: str) -> None:
    c, tensors = config(name), {k: shape for k, (_, shape) in header(name).items()}
    hidden, key = c["hidden_size"], c["linear_num_key_heads"] * c["linear_key_head_dim"]
    value = c["linear_num_value_heads"] * c["linear_value_head_dim"]
    assert c["linear_num_value_heads"] == 2 * c["linear_num_key_heads"]
    assert c["layer_types"] == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert 16 <= c["head_dim"] * c["rope_parameters"]["partial_rotary_factor"] < c["head_dim"]
    assert tensors["model.layers.0.linear_attn.in_proj_qkv.weight"] == (2 * key + value, hidden)
    assert tensors["model.layers.0.linear_attn.conv1d.weight"] == (2 * key + value, 1, 4)
    assert tensors["model.layers.3.self_attn.q_proj.weight"] == (2 * c["num_attention_heads"] * c["head_dim"], hidden)
    assert tensors["mtp.fc.weight"] == (hidden, 2 * hidden)
    if name == "demo-moe":
        experts, inner = c["num_experts"], c["moe_intermediate_size"]
        assert 16 <= experts <= 32 and c["num_experts_per_tok"] == 4
        assert tensors["mtp.layers.0.mlp.experts.gate_up_proj"] == (experts, 2 * inner, hidden)
        assert tensors["model.layers.0.mlp.experts.down_proj"] == (experts, hidden, inner)


@both
def test_transformers_loads_every_tensor(name: str) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(EXAMPLES / name, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@both
def test_eos_ids_are_the_chat_stop_and_the_end_of_text(name: str) -> None:
    tokenizer = load_tokenizer(name)
    generation = json.loads((EXAMPLES / name / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert tokenizer.eos_token == "<|im_end|>"
    assert config(name)["vocab_size"] % 64 == 0 and len(tokenizer) <= config(name)["vocab_size"]


@both
def test_code_is_far_more_likely_than_the_same_words_shuffled(name: str) -> None:
    text = (
        'def total(values):\n    """Return the sum of the values."""\n    result = 0\n'
        "    for value in values:\n        result += value\n    return result\n"
    )
    ids = load_tokenizer(name)(text, return_tensors="pt").input_ids
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        losses = [float(load_model(name)(x, labels=x).loss) for x in (ids, shuffled)]
    assert losses[0] < 2.5 and losses[1] > losses[0] + 2.5


@both
def test_greedy_completion_continues_an_indented_body(name: str) -> None:
    tokenizer, prompt = load_tokenizer(name), "class Point:\n    def __init__(self, x, y):\n        self.x = x\n"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = load_model(name).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :]).startswith("        self.y = y\n")


@both
@pytest.mark.parametrize(
    "text", ["def f(x):\n\treturn x  # é, 漢字, 🙂\n\n\n", "  1234 + 5.6e-7\r\n", "<think>\n\n</think>\n\nhi<|im_end|>\n"]
)
def test_tokenizer_round_trip(name: str, text: str) -> None:
    tokenizer = load_tokenizer(name)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=False) == text


def test_special_tokens_are_single_ids() -> None:
    tokenizer = load_tokenizer("demo-dense")
    for token in (
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_response>",
        "<|vision_start|>",
        "<|image_pad|>",
    ):
        assert len(tokenizer(token).input_ids) == 1, token


USER = {"role": "user", "content": "Hi"}


@both
def test_generation_prompt_thinks_unless_told_otherwise(name: str) -> None:
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert chat([USER], name, add_generation_prompt=True) == turn
    assert chat([USER], name, add_generation_prompt=True, enable_thinking=True) == turn
    assert chat([USER], name, add_generation_prompt=True, enable_thinking=False) == turn + "\n</think>\n\n"


@pytest.mark.parametrize("reply", [{"content": "Yes.", "reasoning_content": "Hm."}, {"content": "<think>\nHm.\n</think>\n\nYes."}])
def test_past_reasoning_is_dropped_unless_preserved(reply: dict[str, str]) -> None:
    messages = [USER, {"role": "assistant", **reply}, {"role": "user", "content": "Why?"}]
    with_reasoning = "<|im_start|>assistant\n<think>\nHm.\n</think>\n\nYes.<|im_end|>\n"
    assert "<|im_start|>assistant\nYes.<|im_end|>\n" in chat(messages)
    assert with_reasoning in chat(messages, preserve_thinking=True)
    assert with_reasoning in chat(messages[:2]), "after the last query the reasoning stays"


def test_tools_calls_and_merged_results() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "note": 'say "x"', "deep": {"k": [1, None]}}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "Add.", "tool_calls": [call, call]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
    ]
    text = chat(messages, tools=[tool], add_generation_prompt=True)
    system = text.split("<|im_end|>")[0]
    assert system.startswith("<|im_start|>system\n# Tools\n") and system.endswith("\n\nBe brief.")
    assert json.loads(system.split("<tools>\n")[1].split("\n</tools>")[0]) == tool
    block = (
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=note>\nsay \"x\"\n</parameter>\n"
        '<parameter=deep>\n{"k": [1, null]}\n</parameter>\n</function>\n</tool_call>'
    )  # fmt: skip
    assert f"<think>\nAdd.\n</think>\n\n{block}\n{block}<|im_end|>\n" in text, "reasoning of the running tool loop stays"
    results = "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
    assert results in text and text.endswith("<|im_start|>assistant\n<think>\n")


def test_image_parts_become_vision_tokens() -> None:
    text = chat([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}])
    assert "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n" in text


@pytest.mark.parametrize(
    "messages",
    [[{"role": "system", "content": "x"}], [USER, {"role": "system", "content": "late"}], [USER, {"role": "judge", "content": "x"}]],
)
def test_malformed_conversations_are_refused(messages: list[dict[str, str]]) -> None:
    with pytest.raises(jinja2.exceptions.TemplateError):
        chat(messages)
