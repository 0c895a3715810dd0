"""Small graphs on DirectML against the CPU provider: the defect that `unshare_concat` is for, and random graphs in search of others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qwen_export.building.build_plan import plan_build
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.plugins.directml.gather_parts import gather_parts
from qwen_export.plugins.directml.provider_fusions import broken_fusions
from qwen_export.plugins.directml.unshare_concat import hazards, unshare_concat
from tests.directml.random_graphs import random_graph
from tests.directml.wine_server import ServerError, WineServer
from tests.support.directml_graphs import CASES, FUSED, SLICED, Case, feeds_of
from tests.support.source_tree import ROOT
from tests.support.standard_graphs import Array

pytestmark = pytest.mark.directml

GRAPHS, PER_TEST = 400, 20


@pytest.fixture(scope="module")
def context() -> PassContext:
    source = open_checkpoint(ROOT / "examples" / "demo-dense")
    return PassContext(source.config.text, "fp32", plan_build(source, "directml", "dml", "fp32").choices, opset=20)


def wrong(found: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, float]:
    """Outputs that differ by more than roundings do, and the largest difference."""
    bad = {}
    for name, want in expected.items():
        share = 1e-3 if want.dtype == np.float32 else 2e-2
        difference = np.abs(found[name].astype(np.float32) - want.astype(np.float32))
        if not (difference <= share * max(1, float(np.abs(want).max()))).all():
            bad[name] = float(difference.max())
    return bad


def on_the_cpu(model: onnx.ModelProto) -> dict[str, Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds_of(model)), strict=True))


def rewritten(model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
    graph = ir.from_proto(model)
    gather_parts(graph, context)
    unshare_concat(graph, context)
    return ir.to_proto(graph)


def test_the_defect_is_there(server: WineServer) -> None:
    """When it is not, the pass can go."""
    assert list(wrong(server.run(CASES[0].model, feeds_of(CASES[0].model)), on_the_cpu(CASES[0].model))) == ["p"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rewritten_graphs_are_right(case: Case, server: WineServer, context: PassContext) -> None:
    assert not wrong(server.run(rewritten(case.model, context), feeds_of(case.model)), on_the_cpu(case.model))


@pytest.mark.parametrize("case", [case for case in CASES if not case.overwritten], ids=lambda case: case.name)
def test_graphs_without_the_defect_are_right_as_they_are(case: Case, server: WineServer) -> None:
    assert not list(hazards(ir.from_proto(case.model).graph))
    assert not wrong(server.run(case.model, feeds_of(case.model)), on_the_cpu(case.model))


@pytest.mark.parametrize("case", SLICED, ids=lambda case: case.name)
def test_parts_are_wrong_or_do_not_compile(case: Case, server: WineServer, context: PassContext) -> None:
    expected, feeds = on_the_cpu(case.model), feeds_of(case.model)
    assert not wrong(server.run(rewritten(case.model, context), feeds), expected)
    if case.refused:
        with pytest.raises(ServerError, match="80070057"):
            server.run(case.model, feeds)
    else:
        assert bool(wrong(server.run(case.model, feeds), expected)) == bool(case.overwritten)


@pytest.mark.parametrize("case", [case for case in FUSED if not case.refused], ids=lambda case: case.name)
def test_neighbors_of_broken_fusions_are_right(case: Case, server: WineServer) -> None:
    assert not wrong(server.run(case.model, feeds_of(case.model)), on_the_cpu(case.model))


@pytest.mark.parametrize("case", [case for case in FUSED if case.refused], ids=lambda case: case.name)
def test_broken_fusions_run_nowhere(case: Case) -> None:
    """Each has a process of its own, which may end with it."""
    alone = WineServer()
    try:
        with pytest.raises(ServerError):
            alone.run(case.model, feeds_of(case.model))
    finally:
        alone.close()


@pytest.mark.parametrize("first", range(0, GRAPHS, PER_TEST))
def test_random_graphs_are_right(first: int, server: WineServer, context: PassContext) -> None:
    bad = {}
    for seed in range(first, first + PER_TEST):
        model = random_graph(seed)
        if list(broken_fusions(ir.from_proto(model).graph)):
            continue
        found = wrong(server.run(rewritten(model, context), feeds_of(model)), on_the_cpu(model))
        if found:
            bad[seed] = found
    assert not bad
