"""Speculative decoding as its user relies on it: the same text, the same state, the same distribution, whatever is drafted."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_export import build
from qwen_export.errors import QwenExportError
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_session import OnnxRuntimeSession
from qwen_export.runtimes.decoding import dynamic_draft_head
from qwen_export.runtimes.decoding.generation import Request, Statistics, generate
from qwen_export.runtimes.decoding.prefix_reuse import PrefixReuse
from qwen_export.runtimes.decoding.prompt_sizes import read_every_size
from qwen_export.runtimes.sampling.distribution import Distribution
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.sampling.token_history import TokenHistory
from qwen_export.runtimes.speculation.acceptance import Acceptance, Draft
from qwen_export.runtimes.speculation.draft_policy import FixedLength
from qwen_export.runtimes.speculation.drafters import HeadDrafter, LookupDrafter
from qwen_export.runtimes.speculation.round_times import measure_rounds
from qwen_export.runtimes.speculation.rounds import Speculator
from tests.support.answers import GREEDY, drafted, plain
from tests.support.family import tiny_config
from tests.support.kernel_families import TOLERANCE, family_of
from tests.support.synthesize import synthesize

HELD_OUT = Path(__file__).parent / "data" / "held_out.py.txt"


@pytest.fixture(scope="module")
def model(demo_bundle: Path) -> Model:
    return load(demo_bundle, threads=2)


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    ids = model.tokenizer.encode(HELD_OUT.read_text())
    return [ids[start : start + 40 + start % 37] for start in range(0, len(ids) - 80, max(1, len(ids) // 6))]


# ---- the same text ----


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_greedy_text_is_the_same_with_and_without_drafts(model: Model, prompts: list[list[int]], k: int) -> None:
    decoder, reference = model.decoder(drafts=True), model.decoder()
    for prompt in prompts:
        tokens, statistics = drafted(decoder, prompt, 40, k)
        assert tokens == plain(reference, prompt, 40)
        assert statistics.new_tokens == 40 and statistics.finish == "length"
    assert statistics.speculation.tokens_per_round > 1


@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
def test_a_prompt_may_be_split_anywhere(model: Model, prompts: list[list[int]], chunk: int) -> None:
    """The draft head reads the prompt in the decoder's chunks: what it drafts does not depend on where they end."""
    expected = None
    for size in (512, chunk):
        decoder = model.decoder(drafts=True)
        decoder.chunk = size
        tokens, statistics = drafted(decoder, prompts[0], 48, 3)
        numbers = (tokens, statistics.speculation.drafted, statistics.speculation.accepted)
        assert numbers == (expected or numbers)
        expected = numbers


def test_turns_of_a_chat_are_the_same_with_and_without_drafts(demo_bundle: Path) -> None:
    def talk(speculate: str | int) -> tuple[list[str], int]:
        model = load(demo_bundle, threads=2, speculate=speculate)
        messages: list[dict[str, str]] = []
        answers, reused = [], 0
        for question in ("What does the function os.path.join do?", "And os.path.split?", "Thanks."):
            messages.append({"role": "user", "content": question})
            answer = model.stream(messages, enable_thinking=False, sampling=GREEDY, max_new_tokens=50)
            answers.append("".join(answer))
            messages.append({"role": "assistant", "content": answer.content})
            reused += answer.statistics.reused_tokens
        return answers, reused

    assert talk("off") == talk(3) == talk("auto") == talk("lookup")


def test_a_draft_never_runs_past_a_stop_token(model: Model, prompts: list[list[int]]) -> None:
    decoder, reference = model.decoder(drafts=True), model.decoder()
    free = plain(reference, prompts[0], 40)
    for position in (1, 2, 3, 5, 8, 13):
        stop = [free[position]]
        expected = plain(reference, prompts[0], 40, stop=stop)
        tokens, statistics = drafted(decoder, prompts[0], 40, 5, stop=stop)
        assert tokens == expected and statistics.finish == "stop"
        assert decoder.tokens() == reference.tokens()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_the_limit_of_new_tokens_holds_inside_a_round(model: Model, prompts: list[list[int]], count: int) -> None:
    decoder, reference = model.decoder(drafts=True), model.decoder()
    tokens, statistics = drafted(decoder, prompts[1], count, 8)
    assert tokens == plain(reference, prompts[1], count) and statistics.finish == "length"
    assert decoder.tokens() == reference.tokens()


def test_a_full_context_ends_a_drafted_stream_where_it_ends_a_plain_one(demo_bundle: Path) -> None:
    def fill(speculate: str | int) -> str:
        answer = load(demo_bundle, max_context=48, threads=2, speculate=speculate).complete("import os\n\n\ndef read(", sampling=GREEDY)
        pieces: list[str] = []
        with pytest.raises(QwenExportError, match="at most 48"):
            pieces.extend(answer)
        return "".join(pieces)

    assert fill(4) == fill("off")


def test_a_stream_left_in_the_middle_of_a_round_can_be_followed_by_another(model: Model, prompts: list[list[int]]) -> None:
    reference = model.decoder()
    reuse = PrefixReuse(model.decoder(drafts=True))
    for left_after in range(1, 7):
        request = Request(prompts[0], Sampler(GREEDY), ())
        speculator = Speculator(HeadDrafter(reuse.decoder.head), FixedLength(5))  # type: ignore[arg-type]
        stream = speculator.generate(reuse, request, Statistics())
        taken = [next(stream) for _ in range(left_after)]
        stream.close()
        assert reuse.decoder.tokens() == (*prompts[0], *taken[:-1])
        longer = [*prompts[0], *taken, 17, 23]
        assert drafted_on(reuse, longer) == plain(reference, longer, 24)


def drafted_on(reuse: PrefixReuse, prompt: list[int]) -> list[int]:
    request = Request(prompt, Sampler(GREEDY), (), 24)
    speculator = Speculator(HeadDrafter(reuse.decoder.head), FixedLength(3))  # type: ignore[arg-type]
    return list(speculator.generate(reuse, request, Statistics()))


def test_lookup_drafts_what_followed_before(model: Model, prompts: list[list[int]]) -> None:
    repeated = prompts[0][:30] * 3
    decoder, reference = model.decoder(), model.decoder()
    request, statistics = Request(repeated, Sampler(GREEDY), (), 32), Statistics()
    tokens = list(Speculator(LookupDrafter(decoder), FixedLength(4)).generate(PrefixReuse(decoder), request, statistics))
    assert tokens == plain(reference, repeated, 32)
    assert statistics.speculation.accepted[0] > 0


def test_lookup_works_for_a_checkpoint_without_a_head(demo_checkpoint: Path, tmp_path: Path) -> None:
    bundle = build(demo_checkpoint, tmp_path / "lookup", mtp=False, lookup=True)
    assert "mtp" not in load_manifest(bundle).graphs
    texts = {
        mode: "".join(load(bundle, threads=2, speculate=mode).complete("import os\nimport os\n", sampling=GREEDY, max_new_tokens=24))
        for mode in ("lookup", "off", "auto")
    }
    assert len(set(texts.values())) == 1


# ---- the same state ----


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_state_after_a_rollback_is_that_of_plain_decoding(model: Model, prompts: list[list[int]], data: st.DataObject) -> None:
    """Rounds of verify and accept with any numbers, then one committed step: states, histories and caches as if read one by one."""
    tokens = prompts[0][:30]
    decoder, reference = model.decoder(), model.decoder()
    start = data.draw(st.integers(1, 8))
    decoder.prefill(tokens[:start])
    at = start
    while at < 20:
        width = data.draw(st.integers(1, 9))
        kept = data.draw(st.integers(0, width))
        good = tokens[at : at + kept]
        decoder.verify([*good, *[7] * (width - kept)])
        decoder.accept(kept)
        at += kept
        if data.draw(st.booleans()):
            mark = decoder.mark()
            decoder.step([3])
            decoder.rewind(mark)
        if data.draw(st.booleans()):
            snapshot = decoder.snapshot()
            decoder.prefill(tokens[:5])
            decoder.restore(snapshot)
        if kept == 0:
            decoder.step([tokens[at]])
            at += 1
    logits = decoder.step([tokens[at]])[0].copy()
    reference.prefill(tokens[:start])
    for token in tokens[start:at]:
        reference.step([token])
    assert np.abs(reference.step([tokens[at]])[0] - logits).max() < 1e-4
    assert decoder.tokens() == reference.tokens()
    for name, buffer in decoder.states.items():
        have, want = buffer.array(), reference.states[name].array()
        if have.ndim == 4 and have.shape[2] == decoder.cache_rows:
            have, want = have[:, :, : at + 1], want[:, :, : at + 1]
        np.testing.assert_allclose(have, want, atol=1e-5, rtol=TOLERANCE[family_of(model.manifest)], err_msg=name)


def test_a_snapshot_inside_a_round_is_exact(model: Model, prompts: list[list[int]]) -> None:
    """Tokens that were accepted but are not in the recurrent state yet travel with the snapshot."""
    decoder, other = model.decoder(drafts=True), model.decoder(drafts=True)
    decoder.prefill(prompts[0])
    decoder.verify(prompts[1][:6])
    decoder.accept(4)
    snapshot = decoder.snapshot()
    expected = decoder.step([11])[0].copy()
    other.prefill(prompts[2])
    other.restore(snapshot)
    np.testing.assert_array_equal(other.step([11])[0], expected)


def test_what_is_prepared_leaves_no_trace(model: Model, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sets of pending inputs are bound, and their graphs run once as a GPU's are when they are recorded; drafts are open meanwhile."""
    monkeypatch.setattr(OnnxRuntimeSession, "records", True)
    alone, prepared = (model.decoder(drafts=True) for _ in range(2))
    for decoder in (alone, prepared):
        decoder.prefill(prompts[0])
        decoder.verify(prompts[1][:4])
        decoder.accept(2)
    busy, bound = prepared.session.busy_s, prepared.binding_s
    prepared.prepare(5)
    assert prepared.session.busy_s == busy and prepared.binding_s > bound, "recording is counted once"
    prepared.warm()
    read_every_size(prepared)
    made = prepared.binding_s
    for tokens in (prompts[2][:5], prompts[3][:2], prompts[4][:5], prompts[0][:5]):
        for decoder in (alone, prepared):
            decoder.verify(tokens)
            decoder.accept(1)
        np.testing.assert_array_equal(alone.step([3]), prepared.step([3]))
    assert prepared.binding_s == made


def test_rows_may_be_caught_up_with_in_blocks(model: Model, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where calls of a few sizes are recorded: the head drafts the same."""

    def texts() -> list[tuple[list[int], list[int]]]:
        decoder, made = model.decoder(drafts=True), []
        for prompt in prompts[:3]:
            decoder.reset()
            ids, statistics = drafted(decoder, prompt, 40, 3)
            made.append((ids, statistics.speculation.accepted))
        return made

    expected = texts()
    monkeypatch.setattr(dynamic_draft_head, "CATCH_UP_BLOCKS", {"cpu": (16, 4, 1)})
    assert texts() == expected


def test_more_than_was_verified_cannot_be_accepted(model: Model, prompts: list[list[int]]) -> None:
    decoder = model.decoder()
    decoder.prefill(prompts[0])
    with pytest.raises(QwenExportError, match="more tokens"):
        decoder.accept(1)
    decoder.verify([1, 2, 3])
    decoder.accept(2)
    decoder.accept(1)
    with pytest.raises(QwenExportError, match="more tokens"):
        decoder.accept(2)
    with pytest.raises(QwenExportError, match="too long"):
        decoder.verify(list(range(10)))


# ---- the same distribution ----


class RandomDrafter:
    """Drafts from distributions that have nothing to do with the model's."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self._vocabulary, self._rng = vocabulary, np.random.default_rng(seed)

    def begin(self) -> None:
        pass

    def draft(self, token: int, count: int, sampler: Sampler, acceptance: Acceptance, history: TokenHistory) -> list[Draft]:
        made = []
        for _ in range(count):
            ids = np.sort(self._rng.choice(self._vocabulary, 12, replace=False))
            probs = self._rng.dirichlet(np.ones(12))
            distribution = Distribution(ids, probs)
            made.append(Draft(distribution.draw(self._rng.random()), distribution))
        return made


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random model that chooses among 24 tokens, with a draft head."""
    directory = tmp_path_factory.mktemp("small")
    config = tiny_config(vision=False, vocab_size=24, eos_token_id=23)
    return load(build(synthesize(config, directory / "checkpoint"), directory / "bundle"), threads=2, max_context=64)


PLAIN = SamplingParams(temperature=1.0)
PENALTIES = SamplingParams(temperature=0.7, top_k=8, top_p=0.9, presence_penalty=1.5, repetition_penalty=1.2, min_p=0.02)
BANS = SamplingParams(temperature=1.0, top_k=8, no_repeat_ngram_size=2, suppress_tokens=(3, 5), bad_words_ids=((7,), (2, 9)))


@pytest.mark.parametrize(
    ("sampling", "drafter"),
    [
        (PLAIN, "random"),
        (PENALTIES, "head"),
        (BANS, "random"),
        *(
            pytest.param(sampling, drafter, marks=pytest.mark.slow)
            for sampling, drafter in ((PLAIN, "head"), (PENALTIES, "random"), (BANS, "head"))
        ),
    ],
)
def test_sampled_tokens_have_the_same_distribution(small_vocabulary: Model, sampling: SamplingParams, drafter: str) -> None:
    """Chi-square over pairs of the second and third token, which come out of rounds."""
    scipy_limit = 4.0  # standard deviations of the statistic, about one in 30000
    decoder = small_vocabulary.decoder(drafts=True)
    assert decoder.head is not None
    reuse, prompt, runs = PrefixReuse(decoder), [1, 2, 3, 4], 1500
    decoder.prefill(prompt[:-1])
    mark = decoder.mark()

    def pairs(drafts: bool) -> Counter[tuple[int, int]]:
        sampler = Sampler(sampling)
        sampler.rng = np.random.default_rng(3)  # no seed of the user's: drafts are accepted by rejection
        source = RandomDrafter(24, 5) if drafter == "random" else HeadDrafter(decoder.head)  # type: ignore[arg-type]
        speculator = Speculator(source, FixedLength(3))
        counts: Counter[tuple[int, int]] = Counter()
        for _ in range(runs):
            decoder.rewind(mark)
            request = Request(prompt, sampler, (), 4)
            made = speculator.generate(reuse, request, Statistics()) if drafts else generate(reuse, request, Statistics())
            tokens = list(made)
            counts[tokens[1], tokens[2]] += 1
        return counts

    with_drafts, without = pairs(True), pairs(False)
    common = [pair for pair in with_drafts | without if with_drafts[pair] + without[pair] >= 10]
    rest = [runs - sum(counts[pair] for pair in common) for counts in (with_drafts, without)]
    cells = [(with_drafts[pair], without[pair]) for pair in common] + ([tuple(rest)] if sum(rest) else [])
    statistic = sum((a - b) ** 2 / (a + b) for a, b in cells)
    degrees = len(cells) - 1
    assert degrees > 5
    assert statistic < degrees + scipy_limit * np.sqrt(2 * degrees)


def test_a_seed_gives_the_same_text_with_any_drafts_and_without(model: Model, prompts: list[list[int]]) -> None:
    """How many tokens are drafted depends on the time of day; what a seed gives must not."""
    decoder, texts = model.decoder(drafts=True), {}
    for seed in (7, 8):
        sampling = SamplingParams(temperature=1.0, top_k=40, top_p=0.95, presence_penalty=0.5, seed=seed)
        texts[seed] = plain(model.decoder(), prompts[0], 40, sampling)
        for k in (1, 3, 8):
            tokens, statistics = drafted(decoder, prompts[0], 40, k, sampling)
            assert tokens == texts[seed]
            assert statistics.speculation.accepted[0] > 0
    assert texts[7] != texts[8]


def test_what_a_plain_bundle_cannot_do_is_said(demo_bundle: Path) -> None:
    with pytest.raises(QwenExportError, match="1 to 8"):
        load(demo_bundle, speculate=9)
    with pytest.raises(QwenExportError, match="not known"):
        load(demo_bundle, speculate="sometimes")


def test_statistics_add_up(model: Model, prompts: list[list[int]]) -> None:
    _, statistics = drafted(model.decoder(drafts=True), prompts[0], 60, 3)
    numbers = statistics.speculation
    assert numbers.tokens == statistics.new_tokens - 1
    assert numbers.drafted[0] <= numbers.rounds and all(a <= d for a, d in zip(numbers.accepted, numbers.drafted, strict=True))
    assert all(a >= b for a, b in pairwise(numbers.drafted)) and all(a >= b for a, b in pairwise(numbers.accepted))
    assert min(numbers.draft_s, numbers.verify_s, numbers.host_s) >= 0


def test_measured_rounds_leave_no_trace(model: Model, prompts: list[list[int]]) -> None:
    """Times of every length that may be drafted, before the first answer."""
    decoder, fresh = model.decoder(drafts=True), model.decoder(drafts=True)
    assert decoder.head is not None
    noted: list[tuple[int, float]] = []
    measure_rounds(decoder, HeadDrafter(decoder.head), 3, lambda count, seconds: noted.append((count, seconds)))
    assert {count for count, _ in noted} == {0, 1, 2, 3} and all(seconds > 0 for _, seconds in noted)
    assert decoder.lengths == [0]
    np.testing.assert_array_equal(decoder.prefill(prompts[0]), fresh.prefill(prompts[0]))
    np.testing.assert_array_equal(decoder.step([5]).copy(), fresh.step([5]).copy())
