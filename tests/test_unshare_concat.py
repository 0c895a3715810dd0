"""Target directml: no value is left that DirectML's compiler would overwrite. What it does with such values is in tests/directml."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qwen_export.building.build_plan import plan_build
from qwen_export.building.lower_graphs import lower
from qwen_export.building.static_plan import StaticOptions
from qwen_export.errors import UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.plugins.directml.check_operators import check_operators
from qwen_export.plugins.directml.gather_parts import gather_parts, overwritten_parts
from qwen_export.plugins.directml.provider_fusions import broken_fusions
from qwen_export.plugins.directml.unshare_concat import hazards, unshare_concat
from tests.support.directml_graphs import CASES, FUSED, SLICED, Case, feeds_of
from tests.support.source_tree import ROOT
from tests.support.standard_graphs import Array

DEMO = ROOT / "examples" / "demo-dense"


@pytest.fixture(scope="module")
def context() -> PassContext:
    source = open_checkpoint(DEMO)
    return PassContext(source.config.text, "fp32", {}, opset=20)


def run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_value_that_a_concat_takes_is_read_from_its_result(case: Case, context: PassContext) -> None:
    model = ir.from_proto(case.model)
    found = list(hazards(model.graph))
    assert [hazard.part.name for hazard in found] == list(case.overwritten)
    outcome = unshare_concat(model, context)
    assert (outcome.changed > 0) == bool(found)
    assert not list(hazards(model.graph))
    rewritten, feeds = ir.to_proto(model), feeds_of(case.model)
    onnx.checker.check_model(rewritten)
    assert [o.name for o in rewritten.graph.output] == [o.name for o in case.model.graph.output]
    for new, old in zip(run(rewritten, feeds), run(case.model, feeds), strict=True):
        assert np.array_equal(new, old)


def test_what_the_pass_did_not_see_is_refused(context: PassContext) -> None:
    model = ir.from_proto(CASES[0].model)
    with pytest.raises(UnsupportedError, match=r"p is joined by .* under Exp, and read by the graph's outputs"):
        check_operators(model, context)


def test_the_graph_of_drafts_has_twelve_and_others_none() -> None:
    """Its pending inputs of six DeltaNet layers; in fp16 a Cast behind the Concat reads it."""
    source = open_checkpoint(DEMO)
    plan = plan_build(source, "directml", "dml", "fp32", max_context=64, options=StaticOptions(16))
    models = lower(source, plan)
    splits = {name: sum(node.name.endswith(".parts") for node in model.graph) for name, model in models.items()}
    assert {name: count for name, count in splits.items() if count} == {"verify": 12}
    assert not {name for name, model in models.items() if list(hazards(model.graph))}


@pytest.mark.parametrize("case", SLICED, ids=lambda case: case.name)
def test_parts_that_would_be_overwritten_are_copied(case: Case, context: PassContext) -> None:
    model = ir.from_proto(case.model)
    outcome = gather_parts(model, context)
    assert outcome.changed == bool(case.refused or case.overwritten)
    assert not list(overwritten_parts(model.graph))
    feeds = feeds_of(case.model)
    for new, old in zip(run(ir.to_proto(model), feeds), run(case.model, feeds), strict=True):
        assert np.array_equal(new, old)


@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.name)
def test_what_the_provider_joins_wrongly_is_refused(case: Case, context: PassContext) -> None:
    found = list(broken_fusions(ir.from_proto(case.model).graph))
    assert bool(found) == case.refused
    if found:
        with pytest.raises(UnsupportedError, match=found[0][1]):
            check_operators(ir.from_proto(case.model), context)


def test_an_output_may_be_taken_from_one_concat_and_then_from_another(context: PassContext) -> None:
    """Found by a random graph: two values had one name."""
    text = """<ir_version: 9, opset_import: ["" : 20]>
        graph (float[4,64] x, float[64,4] w, float[4,4] old) => (float[4,4] v, float[8,4] e, float[8,4] f)
        { p = MatMul(x, w)  v = Identity(p)  c = Concat<axis = 0>(v, old)  e = Exp(c)  d = Concat<axis = 0>(p, old)  f = Tanh(d) }"""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    unshare_concat(model, context)
    assert not list(hazards(model.graph))
    onnx.checker.check_model(ir.to_proto(model))
