"""Target onnx: nothing but standard operators, static shapes, the same model in any runtime."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.lower_graphs import lower
from qwen_export.building.static_plan import StaticOptions
from qwen_export.errors import ContextOverflow, QwenExportError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.static_decoder import StaticDecoder
from tests.support.graph_driver import GraphDriver
from tests.support.static_bundles import Reference, reference_logits, unoptimized
from tests.support.synthesize import synthesize
from tests.test_parity import TOLERANCE, prompt, tiny

CAPACITY, CHUNK = 160, 16
GREEDY = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(
        tiny(value_ratio=2, query_ratio=4, tied=True, vision=False), tmp_path_factory.mktemp("portable") / "checkpoint", with_mtp=False
    )


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return reference_logits(checkpoint)


@pytest.fixture(scope="module")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By tokens that one verify reads."""
    directory = tmp_path_factory.mktemp("bundles")
    return {
        width: build(
            checkpoint, directory / str(width), target="onnx", max_context=CAPACITY, options=StaticOptions(CHUNK, step_tokens=width)
        )
        for width in (1, 4)
    }


@pytest.fixture(params=[1, 4], ids=["one", "four"])
def bundle(request: pytest.FixtureRequest, bundles: dict[int, Path]) -> Path:
    return bundles[request.param]


def decoder(bundle: Path, **options: Any) -> StaticDecoder:
    made = load(bundle, threads=1, **options).decoder()
    assert isinstance(made, StaticDecoder)
    return made


def expected_tokens(reference: Reference, ids: list[int], count: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(reference([*ids, *tokens])[-1].argmax()))
    return tokens


# Numbers


def test_prompts_of_any_length_give_the_logits_of_transformers(bundle: Path, reference: Reference) -> None:
    for length in (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 100):
        ids = prompt(length)
        expected = reference(ids)
        assert np.abs(decoder(bundle).prefill(ids) - expected[-1]).max() <= TOLERANCE
    assert np.abs(decoder(bundle).read(ids) - expected).max() <= TOLERANCE


def test_calls_of_several_chunks_of_the_delta_rule(checkpoint: Path, reference: Reference, tmp_path: Path) -> None:
    """Calls of 80 tokens are two whole chunks and a half."""
    made = build(checkpoint, tmp_path / "bundle", target="onnx", max_context=CAPACITY, options=StaticOptions(80))
    for length in (70, 80, 130):
        ids = prompt(length)
        assert np.abs(decoder(made).read(ids) - reference(ids)).max() <= TOLERANCE


def test_steps_give_the_logits_of_transformers(bundle: Path, reference: Reference) -> None:
    ids = prompt(40)
    expected, machine = reference(ids), decoder(bundle)
    steps = np.concatenate([machine.step([token]).copy() for token in ids])
    assert np.abs(steps - expected).max() <= TOLERANCE


def test_prompts_in_pieces_with_steps_between(bundle: Path, reference: Reference) -> None:
    """Every piece but the last leaves a padded tail behind, which must leave no trace."""
    ids, machine, at = prompt(100, 5), decoder(bundle), 0
    expected = reference(ids)
    for size in (3, 1, 17, 5, 1, 1, 30, 2, 40):
        piece = ids[at : at + size]
        logits = machine.step(piece)[0] if size == 1 else machine.prefill(piece)
        at += size
        assert np.abs(logits - expected[at - 1]).max() <= TOLERANCE


def test_verified_tokens_count_only_when_they_are_accepted(bundles: dict[int, Path], reference: Reference) -> None:
    """Random drafts, of which some begin right; between them steps, prompts and snapshots."""
    machine, ids, rng, at = decoder(bundles[4]), prompt(120, 7), np.random.default_rng(7), 0
    expected = reference(ids)
    actions = itertools.cycle(["verify", "verify", "step", "verify", "prompt", "verify", "snapshot", "mark"])
    while at < 80:
        action = next(actions)
        if action == "verify":
            right = int(rng.integers(0, 5))
            draft = [*ids[at : at + right], *rng.integers(0, 480, 4 - right).tolist()]
            logits = machine.verify(draft)
            assert right == 0 or np.abs(logits[:right] - expected[at : at + right]).max() <= TOLERANCE
            machine.accept(right)
            at += right
        elif action == "step":
            assert np.abs(machine.step([ids[at]])[0] - expected[at]).max() <= TOLERANCE
            at += 1
        elif action == "prompt":
            assert np.abs(machine.prefill(ids[at : at + 21]) - expected[at + 20]).max() <= TOLERANCE
            at += 21
        elif action == "snapshot":
            snapshot = machine.snapshot()
            machine.reset()
            machine.prefill(prompt(9))
            machine.restore(snapshot)
        else:
            mark = machine.mark()
            machine.prefill(prompt(5))
            machine.rewind(mark)
        assert machine.tokens() == tuple(ids[:at])


def test_fp16_with_wide_states(checkpoint: Path, tmp_path: Path, reference: Reference) -> None:
    options = StaticOptions(CHUNK)
    bundle = build(checkpoint, tmp_path / "fp16", target="onnx", precision="fp16", max_context=CAPACITY, options=options)
    kinds = {s.name.rsplit(".")[-1]: s.dtype for graph in load_manifest(bundle).graphs.values() for s in graph.states}
    assert kinds == {"recurrent": "float", "conv_history": "float16", "k_cache": "float16", "v_cache": "float16"}
    ids = prompt(60)
    expected = reference(ids)
    assert np.abs(decoder(bundle).prefill(ids) - expected[-1]).max() <= 0.08 * expected.std()


# The decoder around the graphs


def test_a_context_can_be_filled_to_its_last_token(bundle: Path, reference: Reference) -> None:
    ids, machine = prompt(CAPACITY), decoder(bundle)
    machine.prefill(ids[:-2])
    machine.step([ids[-2]])
    assert np.abs(machine.prefill(ids[-1:]) - reference(ids)[-1]).max() <= TOLERANCE
    with pytest.raises(ContextOverflow):
        machine.step([1])


def test_sequences_of_a_batch_do_not_meet(bundle: Path) -> None:
    batch, texts = load(bundle, threads=1).decoder(batch=2), [prompt(20, 1), prompt(7, 2)]
    for i, ids in enumerate(texts):
        batch.prefill(ids, slot=i)
    together = batch.step([3, 4])
    for i, ids in enumerate(texts):
        alone = decoder(bundle)
        alone.prefill(ids)
        assert np.array_equal(alone.step([3 + i])[0], together[i])


def test_a_larger_context_than_built_for_is_refused(bundle: Path) -> None:
    with pytest.raises(QwenExportError, match="built for"):
        load(bundle, max_context=CAPACITY + 1).decoder()


# The files


def test_graphs_are_standard_static_and_without_loops(bundle: Path) -> None:
    for name in ("decoder.onnx", "prefill.onnx"):
        onnx.checker.check_model(bundle / name, full_check=True)
        model = onnx.load(bundle / name, load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}
        assert not {node.op_type for node in model.graph.node} & {"If", "Loop", "Scan"}
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        values = [*inferred.graph.value_info, *inferred.graph.output]
        known = {v.name for v in values if all(d.HasField("dim_value") for d in v.type.tensor_type.shape.dim)}
        assert known >= {output for node in model.graph.node for output in node.output}


def test_both_graphs_read_the_same_weights_from_one_file(bundle: Path) -> None:
    tables = []
    for name in ("decoder.onnx", "prefill.onnx"):
        model = onnx.load(bundle / name, load_external_data=False)
        external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        tables.append({t.name: {e.key: e.value for e in t.external_data} for t in external})
    steps, prompts = tables
    assert len(prompts) > 40
    own = {name for name in prompts if name.endswith(".kernels")}  # of the convolution, which steps read tap by tap
    assert all(steps[name] == entry for name, entry in prompts.items() if name not in own)
    every = [*steps.values(), *(prompts[name] for name in own)]
    assert {entry["location"] for entry in every} == {"model.weights"}
    ends = sorted((int(e["offset"]), int(e["offset"]) + int(e["length"])) for e in every)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(ends))
    assert ends[-1][1] == (bundle / "model.weights").stat().st_size


@pytest.mark.parametrize(("opset", "norm"), [(18, "ReduceMean"), (20, "ReduceMean"), (23, "RMSNormalization"), (24, "RMSNormalization")])
def test_the_opset_can_be_chosen(checkpoint: Path, opset: int, norm: str) -> None:
    source = open_checkpoint(checkpoint)
    plan = plan_build(source, "onnx", max_context=64, options=StaticOptions(CHUNK, opset=opset))
    for model in lower(source, plan).values():
        assert model.opset_imports[""] == opset
        assert norm in {node.op_type for node in model.graph}


def test_a_norm_can_be_kept_decomposed(checkpoint: Path) -> None:
    source = open_checkpoint(checkpoint)
    plan = plan_build(source, "onnx", max_context=64, options=StaticOptions(CHUNK, opset=23, decompose=("rmsnorm",)))
    assert all("RMSNormalization" not in {node.op_type for node in model.graph} for model in lower(source, plan).values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (StaticOptions(opset=17), "no opset 17"),
        (StaticOptions(decompose=("softmax",)), "no op to decompose called 'softmax'"),
        (StaticOptions(chunk=1), "chunk of 1 tokens"),
        (StaticOptions(step_tokens=0), "step of 0 tokens"),
    ],
)
def test_unusable_options_are_refused(checkpoint: Path, options: StaticOptions, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        plan_build(open_checkpoint(checkpoint), "onnx", options=options)


# Other runtimes


def test_the_reference_evaluator_gives_the_same_tokens(bundle: Path, reference: Reference) -> None:
    graphs = {name: ReferenceEvaluator(str(bundle / f"{name}.onnx")) for name in ("decoder", "prefill")}
    names = {name: [output.name for output in graph.proto_.graph.output] for name, graph in graphs.items()}
    driver = GraphDriver(bundle, lambda name, feeds: dict(zip(names[name], graphs[name].run(None, feeds), strict=True)))
    ids = prompt(CHUNK + 3, 11)
    assert driver.greedy(ids, 4) == expected_tokens(reference, ids, 4)


def test_onnxruntime_without_its_optimizer_gives_the_same_tokens(bundle: Path, reference: Reference) -> None:
    ids = prompt(CHUNK + 3, 11)
    assert unoptimized(bundle).greedy(ids, GREEDY) == expected_tokens(reference, ids, GREEDY)


@pytest.mark.openvino
def test_openvino_gives_the_same_tokens(bundle: Path, reference: Reference) -> None:
    openvino = pytest.importorskip("openvino", reason="pip install 'qwen-export[openvino]'")
    logging.getLogger("openvino").setLevel(logging.ERROR)
    core = openvino.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = {name: core.compile_model(str(bundle / f"{name}.onnx"), "CPU", exact) for name in ("decoder", "prefill")}

    def run(name: str, feeds: dict[str, Any]) -> dict[str, Any]:
        results = compiled[name](feeds)
        return {alias: results[output] for output in compiled[name].outputs for alias in output.get_names()}

    ids = prompt(CHUNK + 3, 11)
    assert GraphDriver(bundle, run).greedy(ids, GREEDY) == expected_tokens(reference, ids, GREEDY)
