"""Engines are really built, with TensorRT-RTX and without a GPU: for two generations of GPUs, of dense and MoE models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_export.building.compiler import build
from qwen_export.building.engines import compile_graph, rebuild
from qwen_export.building.static_plan import StaticOptions
from qwen_export.commands.cli import main
from qwen_export.engine_options import BOUND, EngineOptions
from qwen_export.errors import BuildError, BundleError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.manifest import check_sizes, load_manifest
from qwen_export.plugins.tensorrt.build_engine import Built
from tests.support.engine_program import EVENTS, read_program
from tests.support.family import FAMILY, tiny_config
from tests.support.manifests import write_raw
from tests.support.synthesize import synthesize

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")

from qwen_export.runtimes.backends.tensorrt.tensorrt_library import Library, load_library
from tests.test_parity import small_release_config

SMS = EngineOptions(sms=("89", "120"))
ONE = EngineOptions(sms=("89",))
SIZES = StaticOptions(chunk=128, step_tokens=3)


@pytest.fixture(scope="module")
def library() -> Library:
    return load_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("engines") / "tiny"
    engine = replace(SMS, carry_onnx=True, opt_level=2)
    return build(
        tiny_checkpoint, output, target="tensorrt-rtx", device="cuda", precision="fp16", max_context=256, options=SIZES, engine=engine
    )


def test_the_bundle(bundle: Path) -> None:
    """Six engines without weights, over one file of weights."""
    manifest = load_manifest(bundle)
    check_sizes(bundle, manifest)
    assert set(manifest.graphs) == {"decoder", "verify", "prefill", "mtp", "mtp_verify", "mtp_prefill"}
    spec = manifest.engine
    assert spec is not None
    assert (manifest.target.backend, spec.sms, spec.weights, spec.minimum_cuda) == ("tensorrt-rtx", ("89", "120"), BOUND, "13.0")
    assert spec.version == load_library("tensorrt-rtx").version
    assert set(spec.onnx) == set(manifest.graphs)
    places = {name: {(w.file, w.offset) for w in graph.weights} for name, graph in manifest.graphs.items()}
    assert {file for graph in places.values() for file, _ in graph} == {"model.weights"}
    assert places["prefill"] < places["decoder"] == places["verify"], "prompts and steps read the same memory"


def test_caches_are_written_in_place_and_states_are_not(bundle: Path) -> None:
    for graph in load_manifest(bundle).graphs.values():
        for state in graph.states:
            assert state.in_place == state.grows, state.name


def test_steps_leave_the_largest_logits(bundle: Path) -> None:
    graphs = load_manifest(bundle).graphs
    for name, rows in (("decoder", 1), ("verify", 3), ("mtp", 1)):
        outputs = {t.name: (t.dtype, t.shape) for t in graphs[name].outputs}
        assert outputs["top_logits"] == ("float", (rows, 64))
        assert outputs["top_ids"] == ("int32", (rows, 64))
        assert outputs["logits"][1][:1] == (rows,)
    assert "logits" not in {t.name for t in graphs["prefill"].outputs}


def compiled(library: Library, checkpoint: Path, output: Path, precision: str, names: tuple[str, ...], **wishes: Any) -> dict[str, Built]:
    """What the parser made of some graphs, which were then built for both generations."""
    from qwen_export.building.build_plan import plan_build
    from qwen_export.building.lower_graphs import lower
    from qwen_export.graphs.weights.weight_writer import external, lazy_weights
    from qwen_export.plugins.tensorrt.parser_model import parser_model

    source = open_checkpoint(checkpoint)
    plan = plan_build(source, "tensorrt-rtx", "cuda", precision, **{"max_context": 256, "mtp": False, "engine": SMS, **wishes})
    models, result = lower(source, plan), {}
    for name in names:
        model = models[name]
        for value, weight in lazy_weights([model]):
            value.const_value = external(output / "unwritten", 0, weight, value.name or "")
        inputs, outputs = [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]
        bound = [name for name, value in model.graph.initializers.items() if type(value.const_value).__name__ == "ExternalTensor"]
        result[name] = compile_graph(
            library, name, parser_model(model, bound=True).SerializeToString(), output / name, plan.engine or SMS, {}
        )
        assert set(result[name].inputs) == {*inputs, *bound}
        assert list(result[name].outputs) == outputs
        assert (output / name).stat().st_size < 12_000_000, "an engine has no weights"
    return result


def test_layers_of_a_dense_model(library: Library, tmp_path: Path) -> None:
    """Two attention layers and six of the recurrence: native layers where there are some, and no loop. A prompt's last layer only fills its
    cache: nothing reads its output."""
    checkpoint = synthesize(tiny_config(vision=False, layers=8), tmp_path / "dense")
    built = compiled(library, checkpoint, tmp_path, "bf16", ("decoder", "prefill"), options=SIZES)
    for name, layers in ((name, graph.layers) for name, graph in built.items()):
        assert layers["KV_CACHE_UPDATE"] == 2 * 2
        assert layers["ROTARY_EMBEDDING"] == 2 * 2 - (name == "prefill")
        assert not {"TRIP_LIMIT", "RECURRENCE", "CONDITION", "PLUGIN", "PLUGIN_V2", "PLUGIN_V3"} & set(layers)
    assert built["prefill"].layers["ATTENTION_INPUT"] == 1
    assert "ATTENTION_INPUT" not in built["decoder"].layers, "one query: products and a softmax"
    assert built["decoder"].layers["TOPK"] == 1
    more = built["prefill"].layers["MATRIX_MULTIPLY"] - built["decoder"].layers["MATRIX_MULTIPLY"]
    assert more < 6 * 25, "products of a chunk are for all chunks at once"


def test_layers_of_a_mixture_of_experts(library: Library, tmp_path: Path) -> None:
    checkpoint = synthesize(tiny_config(moe=True, vision=False), tmp_path / "moe")
    built = compiled(library, checkpoint, tmp_path, "fp16", ("decoder", "prefill"), options=StaticOptions(chunk=64))
    assert built["decoder"].layers["TOPK"] == 4 + 1, "one choice of experts a layer, and the logits'"
    assert built["prefill"].layers["CUMULATIVE"] == 2 * 3, "pairs are counted into blocks; nothing reads what the last layer's would make"
    assert "MOE" not in built["prefill"].layers


def test_a_tower_of_fixed_size(library: Library, tmp_path: Path) -> None:
    """Pictures are read on request only: engines have been compiled, and not been run."""
    checkpoint = synthesize(tiny_config(), tmp_path / "sees")
    options = replace(SIZES, picture_tokens=(64,))
    built = compiled(library, checkpoint, tmp_path, "fp16", ("vision_64", "decoder"), options=options, vision=True, engine=ONE)
    assert {"rows", "real_tokens"} < set(built["vision_64"].inputs) and {"features", "places"} < set(built["decoder"].inputs)
    assert built["vision_64"].layers["SOFTMAX"] == 2


@pytest.mark.slow
def test_two_layers_of_the_08b(library: Library, tmp_path: Path) -> None:
    """The real widths, a small vocabulary."""
    config = json.loads(json.dumps(FAMILY["0.8B"]))
    text = config.get("text_config", config)
    text |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "vocab_size": 8320}
    checkpoint = synthesize(config, tmp_path / "two")
    built = compiled(library, checkpoint, tmp_path, "fp16", ("decoder", "verify", "prefill"), options=StaticOptions(256, 4), lookup=True)
    assert built["verify"].layers["KV_CACHE_UPDATE"] == built["decoder"].layers["KV_CACHE_UPDATE"] == 2
    assert built["decoder"].layers["TOPK"] == 2, "a large vocabulary is searched in groups"


@pytest.mark.slow
def test_a_prompt_of_twelve_layers_builds(library: Library, tmp_path: Path) -> None:
    """TensorRT-RTX 1.7.1 cannot compile it where the rotations read the gather of their tables themselves."""
    config = json.loads(json.dumps(FAMILY["0.8B"]))
    text = config["text_config"]
    text |= {"num_hidden_layers": 12, "layer_types": text["layer_types"][:12], "vocab_size": 8320}
    text |= {"hidden_size": 256, "intermediate_size": 256}
    checkpoint = synthesize(config, tmp_path / "deep", with_vision=False, with_mtp=False)
    built = compiled(library, checkpoint, tmp_path, "fp16", ("prefill",))
    assert built["prefill"].layers["KV_CACHE_UPDATE"] == 2 * 3


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "int4", pytest.param("fp8", marks=pytest.mark.slow)])
def test_precisions(library: Library, tiny_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    built = compiled(library, tiny_checkpoint, tmp_path, precision, ("decoder",), options=StaticOptions(chunk=64))["decoder"]
    assert ("DEQUANTIZE" in built.layers) == (precision != "fp32")


def test_rebuild_where_neither_torch_nor_the_checkpoint_is(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    before = load_manifest(copy)
    code = (
        "import sys; from qwen_export.commands.cli import main; main(['rebuild', sys.argv[1], '--sm', '8.6']);"
        "print(sorted({'torch', 'onnx', 'onnx_ir', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(copy)], capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    after = load_manifest(copy)
    check_sizes(copy, after)
    assert after.engine is not None and after.engine.sms == ("86",) and after.engine.options["opt_level"] == 2
    assert after.files["decoder.engine"] != before.files["decoder.engine"]
    assert after.files["model.weights"] == before.files["model.weights"]
    assert not list(copy.glob(".rebuild-*"))


def test_rebuild_refuses_and_changes_nothing(bundle: Path, tmp_path: Path) -> None:
    manifest = (bundle / "manifest.json").read_bytes()
    with pytest.raises(UnsupportedError, match="cannot build for this SM"):
        rebuild(bundle, EngineOptions(sms=("90",)))
    assert (bundle / "manifest.json").read_bytes() == manifest
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    raw = json.loads(manifest)
    raw["engine"]["onnx"] = []
    write_raw(copy, json.dumps(raw))
    with pytest.raises(BundleError, match="does not carry its graphs"):
        rebuild(copy, EngineOptions(sms=("89",)))


def test_embedded_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Engines with their weights need no file of them, and `--layer-dump` says what is in them."""
    engine = EngineOptions(sms=("89",), weights="embedded", layer_dump=tmp_path / "layers")
    options = StaticOptions(chunk=64)
    made = {"target": "tensorrt-rtx", "device": "cuda", "precision": "fp16", "max_context": 64, "mtp": False}
    output = build(tiny_checkpoint, tmp_path / "b", options=options, engine=engine, **made)
    manifest = load_manifest(output)
    check_sizes(output, manifest)
    assert manifest.engine is not None and manifest.engine.weights == "embedded"
    assert "model.weights" not in manifest.files
    assert not any(graph.weights for graph in manifest.graphs.values())
    assert "KV_CACHE_UPDATE" in (tmp_path / "layers" / "decoder.layers.txt").read_text()


@pytest.mark.slow
def test_one_stream_has_no_events(library: Library, tmp_path: Path) -> None:
    """A recurrent layer of the 0.8B's shape runs on two streams where it may."""
    checkpoint = synthesize(small_release_config(), tmp_path / "checkpoint", with_mtp=False)
    events = []
    for streams in (None, 0):
        options = replace(SMS, sms=("89",), aux_streams=streams)
        compiled(library, checkpoint, tmp_path, "fp16", ("decoder",), options=StaticOptions(64), engine=options, max_context=4096)
        events.append(sum(call.kind in EVENTS for call in read_program(tmp_path / "decoder")))
    assert events[0] >= events[1] == 0


def test_too_small_a_workspace_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    engine = EngineOptions(sms=("89",), workspace=1 << 20)
    with pytest.raises(BuildError, match=r"workspace.*Raise workspace"):
        build(tiny_checkpoint, tmp_path / "b", target="tensorrt-rtx", device="cuda", precision="fp16", mtp=False, engine=engine)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (EngineOptions(), "no GPU here"),
        (EngineOptions(sms=("90",)), "cannot build for this SM: got 90"),
        (EngineOptions(sms=("89",), weights="stripped"), "only where there is a GPU"),
        (EngineOptions(sms=("89",), timing_cache=Path("t")), "has no timing cache"),
        (EngineOptions(sms=("89",), hardware_compatibility="ampere+"), "no compatibility of hardware: an engine is for the GPUs that sms"),
    ],
)
def test_refusals(engine: EngineOptions, message: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_export.building.engines.current_sm", lambda: None)
    with pytest.raises(UnsupportedError, match=message):
        build(tiny_checkpoint, tmp_path / "b", target="tensorrt-rtx", device="cuda", precision="fp16", engine=engine)
    assert not (tmp_path / "b").exists()


def test_the_command_line(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def failure(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(["build", str(tiny_checkpoint), "-o", str(tmp_path / "b"), *arguments])
        return " ".join(capsys.readouterr().err.split())

    assert "options of engines" in failure("--sm", "89")
    assert "'9x' is not a compute capability" in failure("--target", "tensorrt-rtx", "--sm", "9x")
