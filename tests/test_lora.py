"""Adapters that are merged while a bundle is built: the same weights as PEFT's merge_and_unload, to 1e-5."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.torch import load_file, save_file

from qwen_export.graphs.checkpoint.adapters.merge_adapters import adapter_source
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint, open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize

peft_adapters = pytest.importorskip("tests.support.peft_adapters", reason="peft is not installed", exc_type=ImportError)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
RANKS = {"rank_pattern": {"layers.1.mlp.down_proj": 3, "q_proj": 8}, "alpha_pattern": {r".*\.layers\.2\.mlp\.up_proj": 5, "q_proj": 32}}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ATTENTION + MLP},
    "rank stabilized": {"r": 9, "lora_alpha": 6, "use_rslora": True, "target_modules": MLP},
    "patterns": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", *MLP], **RANKS},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "out_proj", *MLP]},
    "all linear": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"},
    "embedding and head": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "saved modules": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "input_layernorm", "norm"]},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tiny_config(vision=False), tmp_path_factory.mktemp("dense") / "checkpoint", dtype="fp32", with_mtp=False)


@pytest.fixture(scope="module", params=[True, False], ids=["one tensor", "one by one"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(moe=True, vision=False)
    out = tmp_path_factory.mktemp("moe") / "checkpoint"
    return synthesize(config, out, dtype="fp32", with_mtp=False, fused_experts=request.param)


def opened(checkpoint: Path, *adapters: Path | str) -> Checkpoint:
    return open_checkpoint(checkpoint, adapters=[adapter_source(adapter) for adapter in adapters])


def values(checkpoint: Checkpoint) -> dict[str, npt.NDArray[np.float32]]:
    """Weights by the names of the modules, in blocks of rows; experts in one tensor."""
    found: dict[str, Any] = {}
    with CheckpointReader(checkpoint) as reader:
        for released, weight in checkpoint.weights.items():
            name, rows = released.removeprefix("model."), weight.shape[0]
            blocks = [reader.rows(name, start, min(rows, start + 7)) for start in range(0, rows, 7)]
            found[name] = np.concatenate(blocks)
    for prefix in {name.split(".experts.")[0] for name in found if ".experts.0." in name}:
        count = sum(name.startswith(f"{prefix}.experts.") for name in found) // 3
        parts = {p: [found.pop(f"{prefix}.experts.{e}.{p}_proj.weight") for e in range(count)] for p in ("gate", "up", "down")}
        found[f"{prefix}.experts.gate_up_proj"] = np.concatenate([np.stack(parts["gate"]), np.stack(parts["up"])], axis=1)
        found[f"{prefix}.experts.down_proj"] = np.stack(parts["down"])
    return found


def assert_merged(checkpoint: Path, expected: dict[str, npt.NDArray[np.float32]], *adapters: Path | str) -> None:
    got, before = values(opened(checkpoint, *adapters)), values(open_checkpoint(checkpoint))
    assert got.keys() <= expected.keys()
    for name, rows in got.items():
        np.testing.assert_allclose(rows, expected[name], atol=1e-5, rtol=1e-5, err_msg=name)
    assert any((got[name] != before[name]).any() for name in got)


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_those_of_peft(dense: Path, tmp_path: Path, form: str) -> None:
    adapter = peft_adapters.make_adapter(dense, tmp_path / "adapter", **FORMS[form])
    assert_merged(dense, peft_adapters.merged_weights(peft_adapters.with_adapter(dense, adapter)), adapter)


def test_part_of_the_strength(dense: Path, tmp_path: Path) -> None:
    adapter = peft_adapters.make_adapter(dense, tmp_path / "adapter", **FORMS["plain"])
    expected = peft_adapters.merged_weights(peft_adapters.with_adapter(dense, adapter, scale=0.25))
    assert_merged(dense, expected, f"{adapter}:0.25")


@pytest.mark.parametrize("form", ["plain", "dora"])
def test_several_adapters_one_after_the_other(dense: Path, tmp_path: Path, form: str) -> None:
    first = peft_adapters.make_adapter(dense, tmp_path / "first", **FORMS[form])
    second = peft_adapters.make_adapter(dense, tmp_path / "second", seed=2, **FORMS[form] | {"r": 2})
    assert_merged(dense, peft_adapters.merged_weights(peft_adapters.with_adapter(dense, first, second)), first, second)


EXPERTS: dict[str, dict[str, Any]] = {
    "gate, up and down": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "down": {"target_parameters": ["mlp.experts.down_proj"]},
    "router and shared expert": {"target_modules": ["shared_expert_gate", "up_proj"], "target_parameters": ["mlp.gate.weight"]},
}


@pytest.mark.parametrize("form", EXPERTS)
def test_experts(mixture: Path, tmp_path: Path, form: str) -> None:
    """However the checkpoint stores them."""
    adapter = peft_adapters.make_adapter(mixture, tmp_path / "adapter", r=4, lora_alpha=12, **{"target_modules": [], **EXPERTS[form]})
    assert_merged(mixture, peft_adapters.merged_weights(peft_adapters.with_adapter(mixture, adapter)), adapter)


def test_experts_that_were_trained_one_by_one(mixture: Path, tmp_path: Path) -> None:
    """As models with a module for each expert have them."""
    adapter = peft_adapters.make_adapter(mixture, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["up_proj"])
    rng = np.random.default_rng(0)
    tensors, expected = {}, values(open_checkpoint(mixture))
    H, inner = 64, 32
    for part, (rows, columns) in {"gate": (inner, H), "up": (inner, H), "down": (H, inner)}.items():
        a, b = (rng.normal(size=size).astype(np.float32) for size in ((4, columns), (rows, 4)))
        prefix = f"base_model.model.model.layers.2.mlp.experts.5.{part}_proj"
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        name = "layers.2.mlp.experts." + ("down_proj" if part == "down" else "gate_up_proj")
        matrix = expected[name][5]
        place = matrix if part == "down" else matrix[:inner] if part == "gate" else matrix[inner:]
        place += 2 * b @ a
    from safetensors.numpy import save_file as save_arrays

    save_arrays(tensors, adapter / "adapter_model.safetensors")
    assert_merged(mixture, expected, adapter)


def renamed(adapter: Path, out: Path, change: Any) -> Path:
    shutil.copytree(adapter, out)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({change(name): value for name, value in tensors.items()}, out / "adapter_model.safetensors")
    return out


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace("base_model.model.model.", "base_model.model.model.language_model."),
        lambda name: name.replace("base_model.model.", "base_model.model.base_model.model."),
        lambda name: name.replace("base_model.model.", ""),
        lambda name: name.replace("lora_A.weight", "lora_A.default.weight").replace("lora_B.weight", "lora_B.default.weight"),
        lambda name: name.replace("lm_head.weight", "lm_head.modules_to_save.weight"),
        lambda name: name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight"),
    ],
    ids=["vision model", "wrapped twice", "no prefix", "with its name", "saved modules", "saved modules with a name"],
)
def test_names_of_other_tools(dense: Path, tmp_path: Path, change: Any) -> None:
    adapter = peft_adapters.make_adapter(dense, tmp_path / "adapter", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    other = renamed(adapter, tmp_path / "other", change)
    expected = values(opened(dense, adapter))
    for name, rows in values(opened(dense, other)).items():
        np.testing.assert_array_equal(rows, expected[name])


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids="+".join)
def test_ends_that_were_one(tmp_path: Path, targets: list[str]) -> None:
    """An adapter of a tied model changes one of them: what it was trained as, not what a merge into the shared matrix makes of both."""
    source = synthesize(tiny_config(vision=False, tied=True), tmp_path / "checkpoint", dtype="fp32", with_mtp=False)
    adapter = peft_adapters.make_adapter(source, tmp_path / "adapter", r=4, lora_alpha=16, target_modules=[*targets, "q_proj"])
    checkpoint = opened(source, adapter)
    assert not checkpoint.config.text.tie_word_embeddings
    assert any("which were one" in note for note in checkpoint.notes)
    got = EagerSequence(load_decoder(checkpoint), 32).read(peft_adapters.IDS)
    np.testing.assert_allclose(got, peft_adapters.logits(peft_adapters.with_adapter(source, adapter)), atol=2e-4)


def test_settings_of_the_adapter_that_matter(dense: Path, tmp_path: Path) -> None:
    """alpha is read again: the same matrices at another strength are other weights."""
    adapter = peft_adapters.make_adapter(dense, tmp_path / "adapter", **FORMS["plain"])
    before = values(opened(dense, adapter))["layers.0.mlp.up_proj.weight"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 24}))
    base, after = (values(opened(dense, *a))["layers.0.mlp.up_proj.weight"] for a in ((), (adapter,)))
    np.testing.assert_allclose(after - base, 2 * (before - base), atol=1e-6)
