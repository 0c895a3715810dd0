"""What layouts, converters and fine-tuning tools leave in a checkpoint directory: changes of a tiny flat checkpoint, and their outcome."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.safetensors_files import edit_json

Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], None]
READ, NOTED, REFUSED = "read", "read, with a note", "refused"


@dataclass(frozen=True)
class CheckpointCase:
    """`tool` writes, or a user of it leaves, `what`; `change` makes it of a plain checkpoint. `mention` is in the note or the message."""

    tool: str
    what: str
    change: Change
    outcome: str
    mention: str = ""


def tensors_of(path: Path) -> Tensors:
    """All tensors; the files are removed."""
    tensors: Tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    return tensors


def stored_as(rename: Callable[[str], str]) -> Change:
    return lambda path: save_file({rename(name): tensor for name, tensor in tensors_of(path).items()}, path / "model.safetensors")


def with_tensors(**more: torch.Tensor) -> Change:
    return lambda path: save_file(tensors_of(path) | more, path / "model.safetensors")


def with_config(**values: Any) -> Change:
    return lambda path: edit_json(path / "config.json", lambda config: config.update(values))


def with_file(name: str, content: str) -> Change:
    return lambda path: void((path / name).write_text(content))


def void(_: object) -> None:
    """A statement as an expression."""


def _shards(path: Path) -> None:
    tensors = tensors_of(path)
    names = sorted(tensors)
    files = {"part a.safetensors": names[::2], "part b.safetensors": names[1::2]}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, path / file)
    index = {name: file for file, members in files.items() for name in members}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1.5}, "weight_map": index}))


def _without_index(path: Path) -> None:
    _shards(path)
    (path / "model.safetensors.index.json").unlink()


def _zero_layer(path: Path) -> None:
    tensors = tensors_of(path)
    for name in tensors:
        if name.startswith("model.layers.1.") and name.endswith(("out_proj.weight", "down_proj.weight")):
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, path / "model.safetensors")


def _turned_convolution(path: Path) -> None:
    tensors = tensors_of(path)
    turned = {name: t.transpose(1, 2).contiguous() if name.endswith("conv1d.weight") else t for name, t in tensors.items()}
    save_file(turned, path / "model.safetensors")


def _old_index(path: Path) -> None:
    tensors = tensors_of(path)
    save_file(tensors, path / "model.safetensors")
    save_file(tensors, path / "model-00001-of-00001.safetensors")
    index = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


_ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3.5-0.8B"})

CASES = (
    CheckpointCase("transformers 5.17", "one file, `model.*`", stored_as(lambda name: name), READ),
    CheckpointCase("any", "shards with any names, and an index", _shards, READ),
    CheckpointCase("any", "shards without an index", _without_index, READ),
    CheckpointCase("any", "`model.safetensors` beside an older index", _old_index, NOTED, "is ignored"),
    CheckpointCase(
        "transformers 4, llm-compressor",
        "`model.language_model.*`, flat configuration",
        stored_as(lambda n: n.replace("model.", "model.language_model.", 1)),
        NOTED,
        "model.language_model.*",
    ),
    CheckpointCase(
        "transformers 4", "`language_model.model.*`", stored_as(lambda n: f"language_model.{n}"), NOTED, "language_model.model.*"
    ),
    CheckpointCase("transformers", "a base model, without prefix", stored_as(lambda n: n.removeprefix("model.")), NOTED, "(no prefix)"),
    CheckpointCase("PEFT", "`base_model.model.*`, merged", stored_as(lambda n: f"base_model.model.{n}"), NOTED, "base_model.model"),
    CheckpointCase(
        "PEFT",
        "a LoRA adapter that is not merged, in the weights",
        with_tensors(**{"model.layers.3.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)}),
        REFUSED,
        "not merged",
    ),
    CheckpointCase(
        "PEFT", "adapter_config.json beside a model", with_file("adapter_config.json", _ADAPTER), REFUSED, "adapter beside weights"
    ),
    CheckpointCase("PyTorch", "`module.*` of data parallel training", stored_as(lambda n: f"module.{n}"), NOTED, "module."),
    CheckpointCase("PyTorch", "`_orig_mod.*` of torch.compile", stored_as(lambda n: f"_orig_mod.{n}"), NOTED, "_orig_mod."),
    CheckpointCase("TRL", "a value head, `v_head.*`", with_tensors(**{"v_head.summary.weight": torch.zeros(1, 64)}), NOTED, "v_head"),
    CheckpointCase("transformers", "a classifier head, `score.*`", with_tensors(**{"score.weight": torch.zeros(2, 64)}), NOTED, "score"),
    CheckpointCase("Unsloth", "its keys in config.json", with_config(unsloth_fixed=True, unsloth_version="2026.1"), READ),
    CheckpointCase(
        "any", "a trained LM head although config.json ties it", with_config(tie_word_embeddings=True), NOTED, "stored head is used"
    ),
    CheckpointCase("LLaMA-Pro", "layers of zeros (block expansion)", _zero_layer, READ),
    CheckpointCase("MLX", "turned convolutions, norms with 1 added", _turned_convolution, REFUSED, "MLX"),
    CheckpointCase(
        "MLX", "`quantization` in config.json", with_config(quantization={"bits": 4, "group_size": 64}), REFUSED, "quantization"
    ),
    CheckpointCase("bitsandbytes", "nf4", with_config(quantization_config={"quant_method": "bitsandbytes"}), REFUSED, "bitsandbytes"),
    CheckpointCase(
        "git", "git-lfs pointers", with_file("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), REFUSED, "git lfs pull"
    ),
    CheckpointCase("any", "a key that is not known", with_config(final_logit_softcapping=30.0), REFUSED, "final_logit_softcapping"),
)
