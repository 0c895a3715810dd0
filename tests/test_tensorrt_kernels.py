"""What TensorRT-RTX makes of a step, read from the engine's file: kernels that one bad input layout or one repeated product would add."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from qwen_export.building.build_plan import plan_build
from qwen_export.building.engines import compile_graph, ready_library
from qwen_export.building.lower_graphs import lower
from qwen_export.engine_options import EngineOptions
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.weights.weight_writer import external, lazy_weights
from qwen_export.plugins.tensorrt import step_plugin
from qwen_export.plugins.tensorrt.parser_model import parser_model
from tests.support.engine_program import EVENTS, Call, read_program
from tests.support.synthesize import synthesize
from tests.test_parity import small_release_config

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")


def program(directory: Path, graph: str, *plugins: str) -> list[Call]:
    """A call of layers of the 0.8B's shapes, fp16. Weights are inputs of the engine, so there need not be any."""
    source = open_checkpoint(synthesize(small_release_config(), directory / "checkpoint", with_mtp=False))
    options = EngineOptions(("89",), plugins=plugins)  # one: each SM has a program of its own in the file
    plan = plan_build(source, "tensorrt-rtx", "cuda", "fp16", 4096, mtp=False, lookup=True, engine=options)
    model = lower(source, plan)[graph]
    for value, weight in lazy_weights([model]):
        value.const_value = external(directory / "nowhere", 0, weight, value.name or "")
    path = directory / f"{graph}.engine"
    library = ready_library("tensorrt-rtx", options)
    compile_graph(library, graph, parser_model(model, bound=True).SerializeToString(), path, options, {})
    return read_program(path)


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> list[Call]:
    return program(tmp_path_factory.mktemp("kernels"), "decoder")


def per_layer(calls: list[Call]) -> list[int]:
    """Kernels of each layer but the first."""
    kernels = [call for call in calls if call.kind not in EVENTS]
    ends = [i for i, call in enumerate(kernels) if "down_proj" in call.name]
    return [b - a for a, b in pairwise(ends)]


def test_products_of_one_input_are_one(step: list[Call]) -> None:
    products = [call.name for call in step if call.kind == "fully_connected"]
    found = Counter(name.split(".")[1] for name in products if name.startswith("layers.") and "Gemm" in name)
    assert set(found.values()) == {4}, "the mixer's inputs, its output, gate and up, down"
    assert sum("head" in name for name in products) == 1


def test_no_weight_is_copied(step: list[Call]) -> None:
    """A transposed copy of a tied embedding in every step is what this found."""
    copies = [call for call in step if call.kind == "function" and any(name.startswith("embed_tokens.") for name in call.inputs)]
    assert [call for call in copies if "Gath" not in call.name] == []


def test_attention_has_more_blocks_than_key_heads(step: list[Call]) -> None:
    assert not [call for call in step if "mha" in call.name]


def test_a_step_waits_for_no_second_stream(step: list[Call]) -> None:
    assert not [call for call in step if call.kind in EVENTS]


def test_the_kernels_of_a_layer(step: list[Call]) -> None:
    """Four products each. A recurrent layer: two norms, SwiGLU, convolution, head norms, sums over the state, gated norm; its new state is
    written behind the last layer. An attention layer: nine in place of these four, of which two are the products with the cache."""
    assert per_layer(step) == [11, 11, 16]
    assert len([call for call in step if call.kind not in EVENTS]) <= 56


@pytest.mark.parametrize(("graph", "kernels"), [("decoder", 8), ("verify", 9)])
def test_the_plugin_is_one_kernel(graph: str, kernels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a recurrent layer, for one token and for four."""
    (tmp_path / "kernel.ptx").write_bytes(b"// not read by a build\n")
    monkeypatch.setattr(step_plugin, "find_ptx", lambda element: tmp_path / "kernel.ptx")
    calls = program(tmp_path, graph, "gated_delta_net")
    assert per_layer(calls)[:2] == [kernels, kernels]
    assert sum(call.kind == "custom_layer" for call in calls) == 3


def test_the_caches_are_not_copied(step: list[Call]) -> None:
    large = [call for call in step if call.blocks > 1024]
    assert large == [], "a copy of a cache is more than a thousand blocks"
