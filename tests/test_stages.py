"""A decoder in stages gives what the whole one gives, to the last bit, and its bundle says what it has."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_export import build
from qwen_export.building.stage_plan import balanced_starts
from qwen_export.commands.cli import main
from qwen_export.errors import ParameterError, UnsupportedError
from qwen_export.manifest import load_manifest
from qwen_export.manifest_checks import check
from qwen_export.manifest_parsing import parse
from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.backends.stage_memory import needed_by_stage
from qwen_export.runtimes.backends.staged_session import StagedSession
from qwen_export.runtimes.decoding.generation import Request
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.serving.answering import Answering
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.serving.engine_group import EngineGroup
from qwen_export.runtimes.serving.prompt_routes import PromptRoutes
from qwen_export.verification.logit_check import verify
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize

VOCABULARY, CONTEXT, LAYERS = 64, 96, 8


@pytest.fixture(scope="module", params=["dense", "moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(vision=False, moe=request.param == "moe", layers=LAYERS, vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1)
    return synthesize(config, tmp_path_factory.mktemp("stages") / "checkpoint")


@pytest.fixture(scope="module")
def bundles(checkpoint: Path) -> dict[int, Path]:
    return {n: build(checkpoint, checkpoint.parent / f"stages-{n}", stages=n) for n in (1, 2, 4)}


def read_all(bundle: Path) -> list[np.ndarray]:
    """Logits of prompts, steps of a batch, a verify that is accepted in part, and what follows a snapshot."""
    rng = np.random.default_rng(3)
    with load(bundle, threads=1, max_context=CONTEXT) as model:
        decoder = model.decoder(3)
        texts = [rng.integers(0, VOCABULARY, n).tolist() for n in (40, 7, 7)]
        seen = [rows.array.copy() for rows in decoder.run([Read(slot, text, logits=1) for slot, text in enumerate(texts)])]
        seen.append(np.array(decoder.step([1, 2, 3])))
        seen.append(decoder.verify([4, 5, 6], 0).copy())
        decoder.accept(2, 0)
        snapshot = decoder.snapshot(0)
        seen.append(np.array(decoder.step([7, 8, 9])))
        decoder.restore(snapshot, 2)
        seen.append(np.array(decoder.step([7, 7, 7])))
        return seen


def test_stages_give_the_logits_of_the_whole(bundles: dict[int, Path]) -> None:
    whole = read_all(bundles[1])
    for n in (2, 4):
        for have, want in zip(read_all(bundles[n]), whole, strict=True):
            np.testing.assert_array_equal(have, want)


def test_an_engine_over_stages_gives_the_texts_of_the_whole(bundles: dict[int, Path]) -> None:
    def texts(bundle: Path) -> list[list[int]]:
        with load(bundle, threads=1, max_context=CONTEXT, speculate=2) as model, Engine.of(model, slots=3) as engine:
            requests = [Request(list(range(1, n)), Sampler(SamplingParams(greedy=True)), frozenset(), 12) for n in (3, 5, 9, 30)]
            return [list(stream) for stream in [engine.submit(request) for request in requests]]

    assert texts(bundles[2]) == texts(bundles[1])


def test_two_engines_share_the_stages(bundles: dict[int, Path]) -> None:
    """While one batch is in the second stage, the other is in the first; each gets the texts that it has alone."""
    prompts = [list(range(1, n)) for n in (3, 5, 9, 30)]

    def request(ids: list[int]) -> Request:
        return Request(ids, Sampler(SamplingParams(greedy=True)), frozenset(), 12)

    with load(bundles[1], threads=1, max_context=CONTEXT, speculate="off") as model, Engine.of(model, slots=2) as engine:
        expected = [list(engine.submit(request(ids))) for ids in prompts]
    with (
        load(bundles[2], threads=1, max_context=CONTEXT, speculate="off") as model,
        Engine.of(model, slots=2) as first,
        Engine.of(model, slots=2) as second,
    ):
        streams = [engine.submit(request(ids)) for engine, ids in zip((first, second, first, second), prompts, strict=True)]
        assert [list(stream) for stream in streams] == expected


def test_a_group_of_engines_gives_the_texts_of_one(bundles: dict[int, Path]) -> None:
    """Slots are shared out, and all engines have requests."""
    prompts = [[1 + (7 * n + i) % 62 for i in range(length)] for n, length in enumerate((3, 68, 66, 5, 30))]

    def texts(engine: Answering) -> list[list[int]]:
        first = [list(stream) for stream in [engine.submit(request(ids)) for ids in prompts]]
        return first + [list(engine.submit(request([*ids, *text, 9]))) for ids, text in zip(prompts, first, strict=True)]

    def request(ids: list[int]) -> Request:
        return Request(ids, Sampler(SamplingParams(greedy=True)), frozenset(), 12)

    with load(bundles[1], threads=1, max_context=CONTEXT, speculate=2) as model, Engine.of(model, slots=3) as engine:
        expected = texts(engine)
    with load(bundles[2], threads=1, max_context=CONTEXT, speculate=2) as model:
        with EngineGroup.of(model, slots=3, engines=2) as group:
            assert [engine.slots for engine in group.engines] == [2, 1]
            assert texts(group) == expected
            assert all(engine.statistics.rows for engine in group.engines)
        assert group.closed
        with EngineGroup.of(model, slots=3) as group:
            assert len(group.engines) == 1, "all stages are on one device"
        with pytest.raises(ParameterError, match="more engines than slots"):
            EngineGroup.of(model, slots=2, engines=3)


def test_a_conversation_comes_back_to_the_engine_that_read_its_past() -> None:
    routes, said = PromptRoutes(), list(range(150))
    routes.remember(said, 1)
    routes.remember([9, *said], 0)
    assert routes.find([*said, 7, 8]) == 1 and routes.find([9, *said, 7]) == 0
    assert routes.find([*said[:64], 7]) == 1, "a whole block of it"
    assert routes.find(said[:63]) is None and routes.find([8, *said]) is None
    routes.remember(said, 0)
    assert routes.find(said) == 0, "the last one that read it"


def test_each_stage_has_its_layers_and_weights(bundles: dict[int, Path]) -> None:
    manifest = load_manifest(bundles[4])
    assert [name for name in manifest.graphs if name != "mtp"] == ["decoder.0", "decoder.1", "decoder.2", "decoder.3"]
    layers = [{int(state.name.split(".")[1]) for state in manifest.graphs[f"decoder.{n}"].states} for n in range(4)]
    assert sorted(layer for stage in layers for layer in stage) == list(range(LAYERS))
    assert all(max(one) < min(next_one) for one, next_one in itertools.pairwise(layers))
    for n in range(4):
        assert {weight.file for weight in manifest.graphs[f"decoder.{n}"].weights} == {f"model.{n}.weights"}


def test_verify_proves_a_bundle_in_stages(bundles: dict[int, Path], checkpoint: Path) -> None:
    verify(bundles[2], checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda graphs: graphs.pop("decoder.0"),
        lambda graphs: graphs.__setitem__("decoder.3", graphs.pop("decoder.1")),
        lambda graphs: graphs.__setitem__("decoder.01", graphs.pop("decoder.1")),
        lambda graphs: graphs.__setitem__("decoder", graphs["decoder.0"]),
        lambda graphs: graphs["decoder.1"]["inputs"][-1].__setitem__("shape", ["B", "T", 3]),
        lambda graphs: graphs["decoder.1"]["outputs"].append(dict(graphs["decoder.0"]["outputs"][0])),
    ],
)
def test_a_manifest_with_wrong_stages_is_refused(bundles: dict[int, Path], change: object) -> None:
    raw = json.loads((bundles[2] / "manifest.json").read_text())
    change(raw["graphs"])  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"stage|graph"):
        check(parse(raw))


def test_stages_that_cannot_be_are_refused(checkpoint: Path, bundles: dict[int, Path], tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="out of range"):
        build(checkpoint, tmp_path / "many", stages=LAYERS + 1)
    with pytest.raises(UnsupportedError):
        build(checkpoint, tmp_path / "static", target="onnx", stages=2)
    with pytest.raises(ParameterError, match="spread"):
        load(bundles[2], devices=[0, 1, 2])
    with pytest.raises(ParameterError, match="spread"):
        load(bundles[1], devices=[0, 1])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(0, 60), st.integers(0, 60), st.data())
def test_no_other_cut_has_a_smaller_largest_stage(layers: list[int], first: int, last: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, min(4, len(layers))))
    other = sorted(data.draw(st.sets(st.integers(1, len(layers) - 1), min_size=stages - 1, max_size=stages - 1))) if stages > 1 else []

    def largest(starts: list[int]) -> int:
        stops = [*starts[1:], len(layers)]
        costs = [sum(layers[start:stop]) for start, stop in zip(starts, stops, strict=True)]
        costs[0] += first
        costs[-1] += last
        return max(costs)

    assert largest(balanced_starts(layers, first, last, stages)) <= largest([0, *other])


def test_stages_that_run_side_by_side_give_the_same(bundles: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on several devices: pieces of a prompt follow each other through the stages. Here the stages share the processor."""
    prompt = np.random.default_rng(5).integers(0, VOCABULARY, 300).tolist()

    def logits(bundle: Path) -> list[np.ndarray]:
        with load(bundle, threads=1, max_context=512, speculate=2) as model:
            decoder = model.decoder(2, drafts=True)
            seen = [np.array(decoder.prefill(prompt[:290], 1)), np.array(decoder.prefill(prompt[:3], 0))]
            seen.append(decoder.verify(prompt[3:6], 0).array.copy())
            decoder.accept(2, 0)
            seen.append(np.array(decoder.prefill(prompt[100:], 0)))
            seen.append(decoder.step([1, 2]).array.copy())
            assert decoder.head is not None
            seen += [row.array.copy() for row in decoder.head.first({0: 5, 1: 6}).values()]
            return seen

    whole = logits(bundles[1])
    monkeypatch.setattr(StagedSession, "overlaps", property(lambda session: True, lambda session, value: None), raising=False)
    for n in (2, 4):
        for have, want in zip(logits(bundles[n]), whole, strict=True):
            np.testing.assert_array_equal(have, want)


def test_check_names_what_each_device_needs(bundles: dict[int, Path], capfd: pytest.CaptureFixture[str]) -> None:
    main(["check", str(bundles[4])])
    assert "on cpu:0" in capfd.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        main(["run", str(bundles[2]), "--devices", "0,0", "a"])
    assert "fewer --devices" in capfd.readouterr().err
    needs = needed_by_stage(load_manifest(bundles[4]))
    assert len(needs) == 4
    assert sum(needs) >= needed_by_stage(load_manifest(bundles[1]))[0]
