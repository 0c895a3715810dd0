"""Bundles with adapters merged into them: what they compute, what their manifests say, and what `verify` makes of them."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from qwen_export.building.build_plan import plan_build
from qwen_export.building.compiler import build
from qwen_export.errors import VerifyError
from qwen_export.graphs.checkpoint.adapters.adapter_hash import adapter_facts
from qwen_export.graphs.checkpoint.adapters.merge_adapters import AdapterSource, adapter_source
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.graphs.weights.expression import StoredWeight
from qwen_export.graphs.weights.journal import key_of
from qwen_export.manifest import load_manifest, write_manifest
from qwen_export.plugins.native.native_library import find_library
from qwen_export.runtimes import load
from qwen_export.verification.layer_check import verify_layers
from qwen_export.verification.logit_check import verify
from tests.support.adapters import write_adapter
from tests.support.gguf_files import matrices, write_gguf
from tests.support.source_tree import ROOT

DENSE = ROOT / "examples" / "demo-dense"
MODULES = {
    **{f"layers.{i}.mlp.{part}_proj": size for i in range(8) for part, size in (("gate", (384, 256)), ("down", (256, 384)))},
    "layers.0.linear_attn.in_proj_qkv": (512, 256),
    "layers.0.linear_attn.in_proj_a": (4, 256),
    "layers.3.self_attn.q_proj": (512, 256),
    "layers.7.self_attn.k_proj": (128, 256),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "tuned", MODULES)


@pytest.fixture(scope="module")
def bundle(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(DENSE, tmp_path_factory.mktemp("bundle") / "tuned", lora=[f"{adapter}:0.5"], max_context=128)


def test_a_bundle_computes_what_the_merged_model_does(adapter: Path, bundle: Path) -> None:
    result = verify(bundle, DENSE)
    assert result["passed"], result
    assert verify_layers(bundle, DENSE)["passed"]
    ids = np.random.default_rng(0).integers(0, 8000, 24).tolist()
    got = load(bundle).decoder().read(ids)
    expected, base = (
        EagerSequence(load_decoder(open_checkpoint(DENSE, adapters=adapters)), 32).read(ids)
        for adapters in ([AdapterSource(adapter, 0.5)], [])
    )
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert np.abs(base - expected).max() > 0.1


def test_the_manifest_has_path_scale_and_hashes(adapter: Path, bundle: Path) -> None:
    (entry,) = load_manifest(bundle).source["adapters"]
    assert (entry["path"], entry["scale"]) == (str(adapter), 0.5)
    assert entry["sha256"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in entry["sha256"].values())


def test_verify_takes_the_adapter_where_it_is_now(adapter: Path, bundle: Path, tmp_path: Path) -> None:
    moved, copy = tmp_path / "moved", tmp_path / "bundle"
    shutil.copytree(adapter, moved)
    shutil.copytree(bundle, copy)
    assert verify(copy, DENSE, lora=[f"{moved}:0.5"])["passed"]
    for wrong in ([str(moved)], [f"{moved}:0.5", f"{moved}:0.5"]):
        with pytest.raises(VerifyError, match=r"not the one|another number"):
            verify(copy, DENSE, lora=wrong)
    write_adapter(moved, MODULES, seed=5)
    with pytest.raises(VerifyError, match="not the one that the bundle was built with"):
        verify(copy, DENSE, lora=[f"{moved}:0.5"])


def test_other_weights_than_the_manifest_says(adapter: Path, tmp_path: Path) -> None:
    """`verify` merges what the manifest names: a bundle that has the weights of the base does not pass."""
    plain = build(DENSE, tmp_path / "plain", max_context=128, mtp=False)
    with pytest.raises(VerifyError, match="another number of adapters"):
        verify(plain, DENSE, lora=[adapter])
    manifest = load_manifest(plain)
    write_manifest(plain, replace(manifest, source=manifest.source | {"adapters": adapter_facts([AdapterSource(adapter)])}))
    assert not verify(plain, DENSE)["passed"]


@pytest.mark.skipif(find_library("cpu") is None, reason="plugins/native/cpu/build.sh was not run")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_bundle(adapter: Path, tmp_path: Path, precision: str) -> None:
    bundle = build(DENSE, tmp_path / "bundle", lora=[adapter], precision=precision, max_context=128)
    result = verify(bundle, DENSE)
    assert result["passed"], result


def test_a_quantized_base_is_dequantized_with_a_note(adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(DENSE, file, matrices(Kind.Q8_0))
    checkpoint = open_checkpoint(file, adapters=[AdapterSource(adapter)])
    count = len(MODULES)
    assert f"tuned is merged into {count} weights, of which {count} are stored quantized and become fp32 first" in checkpoint.notes
    plan = plan_build(checkpoint, precision="int8")
    assert plan.quantization is not None
    outcome = plan.quantization.outcome["mlp"]
    # down_proj of all layers; gate and up are one matrix, and gate is merged.
    assert sum(count for line, count in outcome.items() if not line.startswith("kept")) == 24
    bundle = build(file, tmp_path / "bundle", lora=[adapter], max_context=128, mtp=False)
    assert verify(bundle, file)["passed"]


def key(adapters: list[AdapterSource], name: str) -> str:
    checkpoint = open_checkpoint(DENSE, adapters=adapters)
    with CheckpointReader(checkpoint) as reader:
        weight = StoredWeight(name, checkpoint.weights[f"model.{name}"].shape, ir.DataType.FLOAT)
        return key_of(weight, reader.identity)


def test_interrupted_builds_know_their_adapters(adapter: Path, tmp_path: Path) -> None:
    """Finished weights are kept for the same adapter at the same scale only."""
    other, touched = tmp_path / "other", "layers.0.mlp.gate_proj.weight"
    write_adapter(other, MODULES, seed=3)
    keys = [key(adapters, touched) for adapters in ([], [AdapterSource(adapter)], [AdapterSource(adapter, 0.5)], [AdapterSource(other)])]
    assert len(set(keys)) == 4
    assert key([], "layers.0.mlp.up_proj.weight") == key([AdapterSource(adapter)], "layers.0.mlp.up_proj.weight")
    before = key([AdapterSource(other)], touched)
    write_adapter(other, MODULES, seed=3, lora_alpha=16)
    assert key([AdapterSource(other)], touched) != before


def test_a_block_reads_its_own_rows(tmp_path: Path) -> None:
    """So memory does not grow with the matrix: only A is read as a whole."""
    adapter = write_adapter(tmp_path / "adapter", {"layers.0.mlp.up_proj": (384, 256)})
    seen: list[int] = []

    class Watched(CheckpointReader):
        def stored(self, info: Any, start: int, stop: int) -> Any:
            seen.append(stop - start)
            return super().stored(info, start, stop)

    with Watched(open_checkpoint(DENSE, adapters=[AdapterSource(adapter)])) as reader:
        reader.rows("layers.0.mlp.up_proj.weight", 16, 32)
    assert seen == [16, 16]


def test_scales_in_texts(tmp_path: Path) -> None:
    (tmp_path / "a:0.5").mkdir()
    assert adapter_source(f"{tmp_path}/b:0.25") == AdapterSource(tmp_path / "b", 0.25)
    assert adapter_source(f"{tmp_path}/a:0.5") == AdapterSource(tmp_path / "a:0.5")
    assert adapter_source(r"C:\adapters\tuned") == AdapterSource(Path(r"C:\adapters\tuned"))
    assert adapter_source(tmp_path) == AdapterSource(tmp_path)
