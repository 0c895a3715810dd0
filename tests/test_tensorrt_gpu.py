"""Bundles for TensorRT-RTX on a GPU: built there, run there, and compared with the eager modules in fp32."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qwen_export import build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.engine_options import EngineOptions
from qwen_export.errors import BuildError, BundleError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.backends.tensorrt.kernel_cache import VARIABLE
from qwen_export.runtimes.backends.tensorrt.tensorrt_engines import Engines
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.memory import cuda_memory
from qwen_export.runtimes.memory.cuda_driver import memory_info
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.verification.logit_check import TOLERANCE
from tests.conftest import EXAMPLES
from tests.support.greedy import greedy
from tests.support.synthesize import synthesize
from tests.test_parity import small_release_config, tiny

pytestmark = pytest.mark.gpu

CAPACITY, CHUNK, WIDTH = 192, 64, 4
Logits = npt.NDArray[np.float32]

CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "tiny-dense": lambda path: synthesize(tiny(value_ratio=2, query_ratio=4, tied=True), path),
    "tiny-moe": lambda path: synthesize(tiny(moe=True), path, with_mtp=False),
    "demo-dense": lambda path: EXAMPLES / "demo-dense",
    "0.8B-layers": lambda path: synthesize(small_release_config(), path, with_mtp=False),
}


@dataclass
class Subject:
    """A checkpoint, its engines and its eager modules in fp32. `near`: what logits may be off, and tokens as close as that are ties."""

    checkpoint: Path
    bundle: Path
    eager: Any
    near: float

    def compare(self, got: Logits, expected: Logits) -> None:
        """All logits are near. Where experts are chosen, two may be as good as each other in fp16: then another one's output is added, and
        all that follows in the text sees it: up to half of the rows may show that, and none is far off."""
        off = np.abs(np.atleast_2d(got) - np.atleast_2d(expected)).max(-1)
        if self.eager.config.is_moe:
            assert np.mean(off > self.near) <= 0.5 and np.quantile(off, 0.25) < 0.75 * self.near and off.max() < 12 * self.near, off
        else:
            assert off.max() <= self.near, off

    def expected(self, ids: list[int]) -> Logits:
        return EagerSequence(self.eager, CAPACITY).read(ids)

    def decoder(self) -> Decoder:
        return load(self.bundle).decoder()


def compiled(checkpoint: Path, output: Path, precision: str, **options: Any) -> Path:
    static = StaticOptions(CHUNK, step_tokens=WIDTH)
    made = {"target": "tensorrt-rtx", "device": "cuda", "precision": precision, "max_context": CAPACITY, "options": static}
    return build(checkpoint, output, **{**made, **options})


@pytest.fixture(scope="module", autouse=True)
def _kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(directory))
        yield directory


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    directory = tmp_path_factory.mktemp(f"tensorrt-{request.param}")
    checkpoint = CHECKPOINTS[request.param](directory / "checkpoint")
    eager = load_decoder(open_checkpoint(checkpoint))
    scale = float(EagerSequence(eager, CAPACITY).read(prompt(eager, 40)).std())
    return Subject(checkpoint, compiled(checkpoint, directory / "bundle", "fp16"), eager, TOLERANCE["fp16"] * scale)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a tiny dense checkpoint."""
    directory = tmp_path_factory.mktemp("tensorrt-dense")
    return compiled(CHECKPOINTS["tiny-dense"](directory / "checkpoint"), directory / "bundle", "fp16", mtp=False)


def prompt(eager: Any, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, min(480, eager.config.vocab_size), length).tolist()


def same_but_for_ties(subject: Subject, ids: list[int], got: list[int], expected: list[int]) -> None:
    """The first token that differs is as good as the expected one, by the eager modules."""
    at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), None)
    if at is not None:
        logits = subject.expected([*ids, *expected[:at]])[-1]
        assert logits[expected[at]] - logits[got[at]] <= 2 * subject.near, f"token {at}"


# Numbers


@pytest.mark.parametrize("length", [1, 3, CHUNK, 2 * CHUNK - 1, 100])
def test_prompts(subject: Subject, length: int) -> None:
    ids = prompt(subject.eager, length)
    decoder = subject.decoder()
    rows = [decoder.prefill(ids).copy(), *(decoder.step([token])[0].copy() for token in range(20))]
    subject.compare(np.stack(rows), subject.expected([*ids, *range(20)])[length - 1 :])


def test_steps_after_a_prompt(subject: Subject) -> None:
    ids = prompt(subject.eager, 90, 1)
    expected, decoder = subject.expected(ids), subject.decoder()
    rows = [decoder.prefill(ids[:50]).copy(), *(decoder.step([token])[0].copy() for token in ids[50:])]
    subject.compare(np.stack(rows), expected[49:])


def test_the_largest_logits_are_those_of_the_logits(subject: Subject) -> None:
    decoder = subject.decoder()
    decoder.prefill(prompt(subject.eager, 20))
    rows = decoder.step([3])
    top = rows.top(0)
    if top is None:
        pytest.skip("the graph picks none")
    np.testing.assert_array_equal(top.logits, np.sort(rows.array[0])[::-1][: len(top.logits)])
    np.testing.assert_array_equal(rows.array[0][top.ids], top.logits)


def test_greedy_tokens(subject: Subject) -> None:
    ids = prompt(subject.eager, 30, 2)
    got = greedy(subject.decoder(), ids, 40)
    expected: list[int] = []
    for _ in range(12):
        expected.append(int(subject.expected([*ids, *expected])[-1].argmax()))
    same_but_for_ties(subject, ids, got[:12], expected)


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "0.8B-layers"])
def test_fp32_is_within_2e_3(name: str, tmp_path: Path) -> None:
    checkpoint = CHECKPOINTS[name](tmp_path / "checkpoint")
    eager = load_decoder(open_checkpoint(checkpoint))
    ids, decoder = prompt(eager, 80), load(compiled(checkpoint, tmp_path / "bundle", "fp32", mtp=False)).decoder()
    expected = EagerSequence(eager, CAPACITY).read(ids)
    rows = [decoder.prefill(ids[:70]).copy(), *(decoder.step([token])[0].copy() for token in ids[70:])]
    np.testing.assert_allclose(np.stack(rows), expected[69:], rtol=0, atol=2e-3)


# Speculation


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_what_was_not_accepted_leaves_no_trace(subject: Subject, right: int) -> None:
    ids = prompt(subject.eager, 40 + WIDTH + 20, 3)
    expected, decoder = subject.expected(ids), subject.decoder()
    decoder.prefill(ids[:40])
    wrong = [(token + 1) % 400 for token in ids[41 + right : 40 + WIDTH]]
    rows = decoder.verify([*ids[40 : 41 + right], *wrong])[: 1 + right].copy()
    decoder.accept(1 + right)
    rest = [decoder.step([token])[0].copy() for token in ids[41 + right :]]
    subject.compare(np.stack([*rows, *rest]), expected[40:])


@pytest.mark.parametrize("speculate", ["lookup", 1, 3, "auto"])
def test_drafts_do_not_change_the_text(subject: Subject, speculate: int | str) -> None:
    if speculate != "lookup" and load_manifest(subject.bundle).speculation.draft_vocab == 0:  # type: ignore[union-attr]
        pytest.skip("the checkpoint has no draft head")
    phrase, texts = prompt(subject.eager, 12, 4), []
    for way in ("off", speculate):
        model, statistics = load(subject.bundle, speculate=way), Statistics()
        texts.append(list(model.generate(Request(phrase * 3, Sampler(SamplingParams(greedy=True)), (), 60), statistics)))
    same_but_for_ties(subject, phrase * 3, texts[1], texts[0])


def test_marks_and_snapshots_are_exact(subject: Subject) -> None:
    decoder, other = subject.decoder(), subject.decoder()
    decoder.prefill(prompt(subject.eager, 70, 5))
    mark, snapshot = decoder.mark(), decoder.snapshot()
    first = [decoder.step([token])[0].copy() for token in range(5, 15)]
    decoder.rewind(mark)
    other.restore(snapshot)
    for token, row in zip(range(5, 15), first, strict=True):
        np.testing.assert_array_equal(decoder.step([token])[0], row)
        np.testing.assert_array_equal(other.step([token])[0], row)


# The process


def test_steps_are_recorded(dense: Path) -> None:
    decoder = load(dense).decoder()
    greedy(decoder, [1, 2, 3], 8)
    prepared = decoder.binding_s
    decoder.step([4])
    assert decoder.binding_s == prepared > 0, "the calls of both sets of states are recorded"


@pytest.mark.parametrize("weights", ["embedded", "stripped", "stripped, from their file"])
def test_weights_that_engines_have_themselves(dense: Path, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    way, _, source = weights.partition(", ")
    bundle = own_weights(tmp_path, EngineOptions(weights=way))
    if source:
        monkeypatch.setattr(Engines, "fits_beside", staticmethod(lambda nbytes: False))
    expected = load(dense).decoder().prefill(list(range(40))).copy()
    np.testing.assert_allclose(load(bundle).decoder().prefill(list(range(40))), expected, rtol=0, atol=0.05)


def test_weights_that_wait_in_host_memory(tmp_path: Path) -> None:
    bundle = own_weights(tmp_path, EngineOptions(weights="embedded", weight_streaming=True))
    texts = [greedy(load(bundle, weight_budget=budget).decoder(), list(range(40)), 12) for budget in (None, 200_000, 0)]
    assert texts[0] == texts[1] == texts[2]


def own_weights(directory: Path, engine: EngineOptions) -> Path:
    checkpoint = CHECKPOINTS["tiny-dense"](directory / "checkpoint")
    try:
        return compiled(checkpoint, directory / "own", "fp16", mtp=False, engine=engine)
    except BuildError as error:
        if "does not have arch kind assigned" in str(error):
            pytest.skip("TensorRT-RTX 1.5 does not compile constants for this GPU, which it does not support")
        raise


def test_two_bundles_at_a_time(dense: Path, subject: Subject) -> None:
    alone = greedy(load(dense).decoder(), [1, 2, 3], 12)
    one, two = load(dense).decoder(), subject.decoder()
    logits, tokens = one.prefill([1, 2, 3]), []
    two.prefill([1, 2, 3])
    for _ in range(12):
        tokens.append(int(logits.argmax()))
        two.step([7])
        logits = one.step([tokens[-1]])[0]
    assert tokens == alone


def test_another_thread_may_read(dense: Path) -> None:
    decoder = load(dense).decoder()
    expected = greedy(decoder, [1, 2, 3], 6)
    decoder.reset()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(greedy, decoder, [1, 2, 3], 6).result() == expected


def test_unloading_frees_the_memory(dense: Path) -> None:
    def used() -> int:
        model = load(dense)
        greedy(model.decoder(), [1, 2, 3], 6)
        del model
        gc.collect()
        return memory_info()[0]

    free = [used() for _ in range(4)]
    assert free[1] - free[-1] < 4 << 20


def test_a_second_start_finds_its_kernels(dense: Path, _kernels: Path) -> None:
    greedy(load(dense).decoder(), [1, 2, 3], 3)
    kept = {path: path.stat().st_mtime_ns for path in _kernels.glob("*.kernels")}
    assert kept
    greedy(load(dense).decoder(), [1, 2, 3], 3)
    assert {path: path.stat().st_mtime_ns for path in _kernels.glob("*.kernels")} == kept, "no kernel was compiled again"


def test_the_process_ends_in_peace(dense: Path) -> None:
    code = f"from qwen_export.runtimes import load\nd = load({str(dense)!r}).decoder()\nd.prefill([1, 2, 3]); d.step([4]); d.step([5])\n"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    assert not ended.stdout


def test_memory_that_is_not_there() -> None:
    with pytest.raises(BundleError, match="too little free memory"):
        cuda_memory.allocate(1 << 48)
