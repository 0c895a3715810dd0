"""The CPU plugin: its ops against float64, what the build makes of it, and bundles without it."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.lower_graphs import lower
from qwen_export.bundles.inspection import inspect_checkpoint
from qwen_export.errors import BundleError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.config import FULL, LINEAR
from qwen_export.manifest import MANIFEST, load_manifest
from qwen_export.plugins.native import native_library as library
from qwen_export.runtimes import load
from qwen_export.runtimes.backends.compatibility import check_runnable, this_platform
from qwen_export.verification.logit_check import verify
from tests.support import bf16_tiles
from tests.support import cpu_plugin_ops as ops
from tests.support.family import tiny_config
from tests.support.instruction_sets import ROOT, check_in_instruction_set, has_amx
from tests.support.manifests import write_raw
from tests.support.synthesize import synthesize

CPU = library.LIBRARIES["cpu"]
SMALL = tiny_config(layers=2, layer_types=[LINEAR, FULL])


@pytest.fixture(scope="session")
def plugin() -> Path:
    path = library.find_library("cpu")
    if path is None:
        pytest.skip("the CPU plugin is not compiled: `make native` says why")
    return path


@pytest.fixture
def without_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU.variable, "")


def operators(checkpoint: Path, precision: str = "fp32") -> Counter[str]:
    source = open_checkpoint(checkpoint)
    model = lower(source, plan_build(source, precision=precision))["decoder"]
    return Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph)


# ---- ops


@pytest.mark.parametrize("instructions", ["avx512", "avx2", "base"])
def test_ops_in_every_instruction_set(plugin: Path, instructions: str) -> None:
    """Machines that lack one take the next lower; on other processors than x86 all three are the same."""
    check_in_instruction_set(ops, plugin, instructions)


@pytest.mark.parametrize("instructions", ["base_tiles", "amx"])
def test_bf16_tiles(plugin: Path, instructions: str) -> None:
    """The option, with the registers in plain C++ and on a processor that has them."""
    if instructions == "amx" and not has_amx():
        pytest.skip("this processor has no AMX")
    check_in_instruction_set(bf16_tiles, plugin, instructions, QWEN_EXPORT_CPU_BF16_TILES="1")


def test_bf16_tiles_are_an_option(plugin: Path) -> None:
    """Without it, and without tiles, prompts are exact."""
    for variables in ({"QWEN_EXPORT_CPU_SET": "base_tiles"}, {"QWEN_EXPORT_CPU_SET": "base", "QWEN_EXPORT_CPU_BF16_TILES": "1"}):
        command = [sys.executable, "-c", f"from tests.support.cpu_plugin_ops import check_prompt; check_prompt({str(plugin)!r})"]
        done = subprocess.run(command, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]


def test_a_row_is_the_same_on_any_number_of_threads(plugin: Path) -> None:
    x, w, extras = ops.inputs("Linear", 300, 700, "bfloat16")
    one, two = (ops.call(str(plugin), "Linear", x[:5], w, threads, norm=extras["norm"]) for threads in (1, 2))
    assert np.array_equal(one, two)


def test_silu_of_large_values(plugin: Path) -> None:
    """exp neither overflows nor makes NaN; the gate of a very negative value is zero."""
    x = np.array([[-1000.0], [-90.0], [-1.0], [0.0], [90.0], [1000.0]], np.float32)
    got = ops.call(str(plugin), "SwiGlu", x, np.ones((2, 1), np.float32))
    assert np.allclose(got, np.array([[0], [0], [0.26894142], [0], [8100], [1e6]]), rtol=1e-6, atol=1e-30)


def test_shapes_that_do_not_fit_are_an_error(plugin: Path) -> None:
    x, w = np.zeros((2, 8), np.float32), np.zeros((4, 9), np.float32)
    with pytest.raises(Exception, match="do not fit"):
        ops.call(str(plugin), "Linear", x, w)
    with pytest.raises(Exception, match="another shape than the result"):
        ops.call(str(plugin), "Linear", x, np.zeros((4, 8), np.float32), residual=np.zeros((1, 4), np.float32))


def test_no_rows_are_no_work(plugin: Path) -> None:
    assert ops.call(str(plugin), "Linear", np.zeros((0, 8), np.float32), np.zeros((4, 8), np.float32)).shape == (0, 4)


# ---- what the build makes of it


def test_products_take_norms_residuals_and_gates_in(plugin: Path, tiny_checkpoint: Path) -> None:
    counts = operators(tiny_checkpoint)
    assert counts["qwen.native.SwiGlu"] == 4
    assert counts["qwen.native.GatedAttention"] == 1 and not counts["com.microsoft.GroupQueryAttention"]
    assert not {"com.microsoft.FusedMatMul", "com.microsoft.SkipSimplifiedLayerNormalization", "com.microsoft.QuickGelu"} & set(counts)
    assert "Add" not in counts


def test_without_the_plugin_nothing_is_native(tiny_checkpoint: Path, without_plugin: None) -> None:
    counts = operators(tiny_checkpoint)
    assert counts["com.microsoft.FusedMatMul"] and counts["com.microsoft.GroupQueryAttention"]
    assert not [name for name in counts if name.startswith(library.NATIVE)]


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_stay_bf16_where_the_checkpoint_has_them_so(plugin: Path, tied: bool, tmp_path: Path) -> None:
    checkpoint = synthesize(tiny_config(tied=tied, layers=2, layer_types=[LINEAR, FULL]), tmp_path / "checkpoint")
    model = lower(source := open_checkpoint(checkpoint), plan_build(source, mtp=False, lookup=True, vision=False))["decoder"]
    types: dict[str, set[str]] = {}
    for name, value in model.graph.initializers.items():
        assert value.dtype is not None and value.shape is not None
        types.setdefault(value.dtype.name, set()).add(name)
        if len(value.shape) == 2 and "_proj" in name:
            assert value.dtype.name == "BFLOAT16", name
    assert "embed_tokens.weight" in types["BFLOAT16"] and ("lm_head.weight" in types["BFLOAT16"]) is not tied
    assert not [name for name in types["BFLOAT16"] if "norm" in name or "A_log" in name or "dt_bias" in name or "conv" in name]
    floats = {value.dtype.name for value in model.graph.outputs if value.dtype and value.name != "top_ids"}
    assert floats == {"FLOAT"}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_other_checkpoints_stay_fp32(plugin: Path, dtype: str, make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = make_checkpoint(SMALL, dtype=dtype)
    model = lower(source := open_checkpoint(checkpoint), plan_build(source, mtp=False, lookup=True, vision=False))["decoder"]
    assert "BFLOAT16" not in {value.dtype.name for value in model.graph.initializers.values() if value.dtype}


def test_the_bundle_has_the_plugin_and_half_the_bytes(
    plugin: Path, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_manifest(tiny_bundle)
    assert manifest.plugins == (CPU.file,) and manifest.target.platform == this_platform()
    assert "bf16" in manifest.precision_plan["weights"]
    assert (tiny_bundle / CPU.file).read_bytes() == plugin.read_bytes()
    estimates = [plan_build(open_checkpoint(tiny_checkpoint)).bundle_bytes]
    monkeypatch.setenv(CPU.variable, "")
    other = build(tiny_checkpoint, tmp_path / "bundle")
    plain = load_manifest(other)
    assert plain.plugins == () and plain.target.platform == "" and plain.precision_plan["weights"] == "fp32"
    estimates.append(plan_build(open_checkpoint(tiny_checkpoint)).bundle_bytes)
    sizes = [(bundle / "model.weights").stat().st_size for bundle in (tiny_bundle, other)]
    assert sizes[0] < 0.65 * sizes[1]
    for size, estimate in zip(sizes, estimates, strict=True):
        assert 0 <= size - estimate < 4096 * 100, "every tensor begins on a page"


def test_inspect_tells_the_lowering(plugin: Path, tiny_checkpoint: Path) -> None:
    entries = {(e["target"], e["device"], e["precision"]): e for e in inspect_checkpoint(tiny_checkpoint)["targets"]}
    assert entries["onnxruntime", "cpu", "fp32"]["lowerings"]["linear"] == "native_linear"


@pytest.mark.parametrize("native", [True, False], ids=["plugin", "no plugin"])
def test_bundles_compute_what_transformers_computes(
    native: bool, plugin: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setenv(CPU.variable, "")
    bundle = build(tiny_checkpoint, tmp_path / "bundle")
    report = verify(bundle, tiny_checkpoint)
    assert report["passed"], report
    assert {check["against"] for check in report["checks"]} >= {"eager", "transformers"}
    assert max(check["max_abs_error"] or 0 for check in report["checks"]) < 1e-4


def test_any_rotary_width(plugin: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Four pairs of values: GroupQueryAttention turns multiples of 16 values only."""
    rope = {**tiny_config(vision=False)["rope_parameters"], "mrope_section": [2, 1, 1]}
    checkpoint = make_checkpoint(tiny_config(vision=False, head_dim=32, rope_parameters=rope))
    report = verify(build(checkpoint, tmp_path / "bundle"), checkpoint)
    assert report["passed"], report


def test_tokens_at_once_are_tokens_one_by_one(plugin: Path, tiny_bundle: Path) -> None:
    model, ids = load(tiny_bundle, threads=2), list(range(40, 48))
    at_once, step = model.decoder(), model.decoder()
    together = at_once.read(ids).copy()
    alone = np.concatenate([step.read([token]).copy() for token in ids])
    assert np.abs(together - alone).max() < 1e-5


# ---- machines where it cannot run


def test_a_bundle_for_another_machine_is_refused(plugin: Path, bundle_copy: Path) -> None:
    path = bundle_copy / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["target"]["platform"] = "linux riscv64"
    write_raw(bundle_copy, json.dumps(manifest))
    with pytest.raises(BundleError, match="another kind of machine") as refused:
        check_runnable(load_manifest(bundle_copy))
    assert "linux riscv64" in str(refused.value) and this_platform() in str(refused.value)


def test_a_library_that_does_not_load_is_one_sentence(plugin: Path, bundle_copy: Path) -> None:
    content = b"no machine code"
    (bundle_copy / CPU.file).write_bytes(content)
    path = bundle_copy / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][CPU.file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_raw(bundle_copy, json.dumps(manifest))
    with pytest.raises(BundleError, match="cannot be loaded on this machine"):
        load(bundle_copy)


def test_a_variable_that_names_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU.variable, str(tmp_path / "none.so"))
    with pytest.raises(UnsupportedError, match="does not exist"):
        library.find_library("cpu")


def test_the_library_exports_one_function(plugin: Path) -> None:
    assert ctypes.CDLL(str(plugin)).RegisterCustomOps
