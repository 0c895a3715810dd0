"""Generated checkpoints have the released layout, load in transformers, and do not depend on how they are split."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.tensor_table import Layout, tensor_table
from tests.support.family import FAMILY, PUBLISHED_BYTES, tiny_config
from tests.support.synthesize import synthesize

ITEM_SIZE = {"BF16": 2, "F16": 2, "F32": 4}

TRANSFORMERS_CLASSES = {
    "Qwen3_5ForConditionalGeneration": transformers.Qwen3_5ForConditionalGeneration,
    "Qwen3_5ForCausalLM": transformers.Qwen3_5ForCausalLM,
    "Qwen3_5MoeForConditionalGeneration": transformers.Qwen3_5MoeForConditionalGeneration,
    "Qwen3_5MoeForCausalLM": transformers.Qwen3_5MoeForCausalLM,
}


def load(path: Path) -> Any:
    """The transformers model in fp32, after checking that it took every tensor but those of the MTP layer."""
    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    loader: Any = TRANSFORMERS_CLASSES[architecture]
    model, info = loader.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert not [key for key in info["unexpected_keys"] if not key.startswith("mtp.")]
    return model.eval()


def stored(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in path.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    return tensors


@pytest.mark.parametrize("size", PUBLISHED_BYTES)
def test_tensor_list_adds_up_to_the_published_size(size: str) -> None:
    layout = Layout(fp32_decay=not size.startswith("3.6"))
    total = sum(math.prod(entry.shape) * ITEM_SIZE[entry.dtype] for entry in tensor_table(FAMILY[size], layout))
    assert total == PUBLISHED_BYTES[size]


@pytest.mark.parametrize(
    ("size", "decoder", "vision", "mtp"), [("0.8B", 320, 153, 15), ("27B", 851, 333, 15), ("397B-A17B", 1038, 333, 1553)]
)
def test_tensor_count_of_a_release(size: str, decoder: int, vision: int, mtp: int) -> None:
    names = [entry.name for entry in tensor_table(FAMILY[size])]
    parts = Counter("vision" if name.startswith("model.visual.") else "mtp" if name.startswith("mtp.") else "decoder" for name in names)
    assert (parts["decoder"], parts["vision"], parts["mtp"]) == (decoder, vision, mtp)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("moe", "fused_experts"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vision", [True, False])
def test_transformers_loads_every_layout(tmp_path: Path, vision: bool, tied: bool, moe: bool, fused_experts: bool) -> None:
    config = tiny_config(moe=moe, vision=vision, tied=tied)
    load(synthesize(config, tmp_path, fused_experts=fused_experts, fused_mtp_experts=fused_experts))


@pytest.mark.parametrize(("value_ratio", "query_ratio"), [(1, 4), (2, 6), (3, 8), (4, 16), (8, 4)])
def test_logits_have_the_deviation_of_a_fresh_model(tmp_path: Path, value_ratio: int, query_ratio: int) -> None:
    config = tiny_config(value_ratio=value_ratio, query_ratio=query_ratio, vision=False)
    model = load(synthesize(config, tmp_path, dtype="fp32"))
    with torch.no_grad():
        logits = model(torch.arange(1, 101)[None]).logits
    assert 0.45 < logits.std().item() < 0.85


def test_recurrent_state_reaches_far(tmp_path: Path) -> None:
    """The first token still changes the last logits of a long prompt through the linear layers alone."""
    config = tiny_config(vision=False, layers=3)
    model = load(synthesize(config, tmp_path, dtype="fp32"))
    prompts = torch.arange(1, 201).repeat(2, 1)
    prompts[1, 0] = 300
    with torch.no_grad():
        logits = model(prompts, use_cache=False).logits[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_values_depend_on_seed_and_name_only(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=20_000)  # embedding above the size that is drawn directly
    one = stored(synthesize(config, tmp_path / "one", seed=3))
    three_shards = stored(synthesize(config, tmp_path / "three", seed=3, shards=3))
    other_seed = stored(synthesize(config, tmp_path / "other", seed=4))
    assert len(list((tmp_path / "three").glob("*.safetensors"))) == 3
    assert one.keys() == three_shards.keys() == other_seed.keys()
    assert all(torch.equal(one[name], three_shards[name]) for name in one)
    assert not any(torch.equal(one[name], other_seed[name]) for name in one)


def test_no_row_of_a_large_tensor_repeats(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=70_000)  # 4.5 M elements, more than the ring of random numbers holds
    tensors = stored(synthesize(config, tmp_path, with_vision=False))
    rows = torch.cat([tensors["model.language_model.embed_tokens.weight"], tensors["lm_head.weight"]]).view(torch.int16)
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_index_lists_what_is_stored(tmp_path: Path) -> None:
    synthesize(tiny_config(), tmp_path, shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = stored(tmp_path)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert {t.dtype for name, t in tensors.items() if name.endswith(("A_log", "linear_attn.norm.weight"))} == {torch.float32}
    assert all(t.isfinite().all() for t in tensors.values())


def test_parts_can_be_left_out(tmp_path: Path) -> None:
    synthesize(tiny_config(), tmp_path, with_mtp=False, with_vision=False, fp32_decay=False, generation_config=False)
    assert all(name.startswith(("model.language_model.", "lm_head.")) for name in stored(tmp_path))
    assert {tensor.dtype for tensor in stored(tmp_path).values()} == {torch.bfloat16}
    assert not (tmp_path / "generation_config.json").exists()


def test_unperturbed_norms_are_those_of_a_fresh_model(tmp_path: Path) -> None:
    tensors = stored(synthesize(tiny_config(), tmp_path, perturb=False))
    assert not tensors["model.language_model.norm.weight"].any()
    assert tensors["model.language_model.layers.0.linear_attn.norm.weight"].eq(1).all()


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bf16"):
        synthesize(tiny_config(), tmp_path, dtype="int4")


def test_tokenizer_is_copied_with_its_template(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (source / name).write_text(name)
    out = synthesize(tiny_config(vocab_size=248320), tmp_path / "out", tokenizer=source)
    assert (out / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert not (out / "README.md").exists()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [248046, 248044]
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        synthesize(tiny_config(), tmp_path / "none", tokenizer=tmp_path)
