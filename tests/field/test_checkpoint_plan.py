"""What is decided before any weight is read: tokenizers larger than the embedding, odd vocabularies, mixed formats, layers of zeros."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5ForCausalLM

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.bundles.inspection import inspect_checkpoint
from qwen_export.errors import CheckpointError, ConfigError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.manifest import load_manifest
from qwen_export.verification.logit_check import reference_plan
from tests.support.family import tiny_config
from tests.support.safetensors_files import edit_json
from tests.support.static_bundles import unoptimized

Make = Callable[..., Path]
IDS = [5, 77, 300, 40, 18, 9, 120, 33]


# A tokenizer larger than the embedding


def add_token(content: dict[str, Any]) -> None:
    content["added_tokens"].append({"id": 512, "content": "<mol>", "special": False})


def test_a_token_without_a_row(checkpoint_copy: Path) -> None:
    plan_build(open_checkpoint(checkpoint_copy))
    edit_json(checkpoint_copy / "tokenizer.json", add_token)
    with pytest.raises(UnsupportedError, match=r"id 512 \('<mol>'\).*512 rows.*resize_token_embeddings"):
        plan_build(open_checkpoint(checkpoint_copy))
    report = inspect_checkpoint(checkpoint_copy, targets=("onnxruntime", "onnx"))
    assert all("<mol>" in entry["why"] for entry in report["targets"])


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"model": {"vocab": {"a": "x"}}, "added_tokens": 7}', '{"model": [], "added_tokens": [[1]]}']
)
def test_a_damaged_tokenizer_is_a_message_or_no_tokenizer(checkpoint_copy: Path, text: str) -> None:
    (checkpoint_copy / "tokenizer.json").write_text(text)
    try:
        plan_build(open_checkpoint(checkpoint_copy))
    except CheckpointError as error:
        assert "tokenizer" in str(error) and error.fix


# Odd vocabularies and blocks


@pytest.mark.parametrize("head", ["int8", "int4", "int4 zeros"])
def test_an_odd_vocabulary_on_standard_operators(make_checkpoint: Make, tmp_path: Path, head: str) -> None:
    """Rows of 4 bits that end within a byte, against the same codes in the CPU's packed layout."""
    path = make_checkpoint(tiny_config(vocab_size=509, hidden_size=128, intermediate_size=128, vision=False), with_mtp=False)
    plan = tmp_path / "plan.toml"
    plan.write_text(f'[lm_head]\nformat = "{head.split()[0]}"\nzeros = {str("zeros" in head).lower()}\n')
    bundle = build(path, tmp_path / "bundle", target="onnx", precision="int4", plan_file=plan, max_context=64)
    quantized = load_decoder(open_checkpoint(path), reference_plan(open_checkpoint(path), load_manifest(bundle), bundle))
    tokens = unoptimized(bundle).greedy(IDS, 4)
    wanted = EagerSequence(quantized, 32).read([*IDS, *tokens])[len(IDS) - 1 : -1]
    # ONNX Runtime rounds what a product of codes reads to 8 bits: near-ties may go the other way, a wrong code would be off by far more.
    assert all(row.max() - row[token] < 0.1 * wanted.std() for row, token in zip(wanted, tokens, strict=True))


@pytest.mark.parametrize("target", ["onnx", "directml"])
def test_rows_that_are_no_whole_blocks_are_refused_by_the_plan(make_checkpoint: Make, target: str) -> None:
    path = make_checkpoint(tiny_config(hidden_size=80, vision=False), with_mtp=False)
    device = "cpu" if target == "onnx" else "gpu"
    entries = inspect_checkpoint(path, targets=(target,))["targets"]
    entries = [entry for entry in entries if entry["precision"] in ("int8", "int4")]
    assert entries and device
    for entry in entries:
        assert not entry["supported"] and "whole blocks of 32" in entry["why"] and "precision plan" in entry["why"]


def test_an_embedding_of_4_bits_on_standard_operators(make_checkpoint: Make, tmp_path: Path) -> None:
    path = make_checkpoint(tiny_config(vision=False), with_mtp=False)
    plan = tmp_path / "plan.toml"
    plan.write_text('[embedding]\nformat = "int4"\n')
    with pytest.raises(UnsupportedError, match=r"embedding cannot have 4 bits.*int8"):
        plan_build(open_checkpoint(path), "onnx", precision="int4", plan_file=plan)


# One matrix, one format


def test_experts_of_a_layer_with_two_formats_are_refused(make_checkpoint: Make, tmp_path: Path) -> None:
    """Before, they were not quantized, without a message."""
    path = make_checkpoint(tiny_config(vision=False, moe=True), fused_experts=False, with_mtp=False)
    plan = tmp_path / "plan.toml"
    plan.write_text('[matrices]\n"layers.1.mlp.experts.2.*" = { format = "int8" }\n')
    with pytest.raises(ConfigError, match=r"same format.*layers\.1\.mlp\.experts\."):
        plan_build(open_checkpoint(path), precision="int4", plan_file=plan)
    plan.write_text('[matrices]\n"layers.1.mlp.experts.*" = { format = "int8" }\n')
    plan_build(open_checkpoint(path), precision="int4", plan_file=plan)


# Layers of zeros


def test_a_layer_that_block_expansion_added(make_checkpoint: Make) -> None:
    """Its output projections are zero, so it changes nothing until it is trained. transformers runs it."""
    path = make_checkpoint(tiny_config(vision=False), with_mtp=False)
    shard = next(path.glob("*.safetensors"))
    tensors = load_file(shard)
    zero = [name for name in tensors if name.startswith("model.layers.1.") and name.endswith(("out_proj.weight", "down_proj.weight"))]
    assert len(zero) == 2
    save_file(tensors | {name: torch.zeros_like(tensors[name]) for name in zero}, shard, {"format": "pt"})
    theirs = Qwen3_5ForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor([IDS])).logits[0].numpy()
    checkpoint = open_checkpoint(path)
    np.testing.assert_allclose(EagerSequence(load_decoder(checkpoint), 32).read(IDS), wanted, atol=1e-4)
    plan_build(checkpoint, precision="int4")


def test_notes_reach_the_plan_and_the_report(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config["text_config"].pop("mtp_num_hidden_layers"))
    checkpoint = open_checkpoint(checkpoint_copy)
    report = inspect_checkpoint(checkpoint_copy, targets=("onnxruntime",))
    assert list(checkpoint.notes) == report["notes"] and checkpoint.notes[0] in plan_build(checkpoint).notes
    json.dumps(report)
