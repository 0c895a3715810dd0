"""Drafts over graphs of fixed shapes: the same text with and without, whatever the calls are cut into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from qwen_export import build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.generation import Request, Statistics, generate
from qwen_export.runtimes.decoding.prefix_reuse import PrefixReuse
from qwen_export.runtimes.model import Model
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.speculation.draft_policy import FixedLength
from qwen_export.runtimes.speculation.drafters import HeadDrafter
from qwen_export.runtimes.speculation.rounds import Speculator
from tests.support.family import tiny_config

GREEDY = SamplingParams(greedy=True)
HELD_OUT = Path(__file__).parent / "data" / "held_out.py.txt"


@pytest.fixture(scope="module", params=["onnx", "directml"])
def bundle(request: pytest.FixtureRequest, demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("static") / request.param
    device = {"onnx": "cpu", "directml": "dml"}[request.param]
    return build(demo_checkpoint, output, target=request.param, device=device, precision="fp32", max_context=512, options=StaticOptions(48))


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return load(bundle, threads=1, device="cpu")


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    ids = model.tokenizer.encode(HELD_OUT.read_text())
    return [ids[start : start + length] for start, length in ((0, 3), (40, 49), (90, 50), (len(ids) - 97, 97))]


def plain(decoder: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    return list(generate(PrefixReuse(decoder), Request(prompt, Sampler(GREEDY), (), count), Statistics()))


def drafted(reuse: PrefixReuse, prompt: Sequence[int], count: int, k: int) -> tuple[list[int], Statistics]:
    assert reuse.decoder.head is not None
    request, statistics = Request(prompt, Sampler(GREEDY), (), count), Statistics()
    return list(Speculator(HeadDrafter(reuse.decoder.head), FixedLength(k)).generate(reuse, request, statistics)), statistics


def test_the_set_of_graphs(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert set(manifest.graphs) == {"decoder", "verify", "prefill", "mtp", "mtp_verify", "mtp_prefill"}
    tokens = {name: next(t.shape[1] for t in graph.inputs if t.name == "input_ids") for name, graph in manifest.graphs.items()}
    assert tokens == {"decoder": 1, "verify": 4, "prefill": 48, "mtp": 1, "mtp_verify": 4, "mtp_prefill": 48}
    takes_pending = {name for name, graph in manifest.graphs.items() if any(state.pending for state in graph.states)}
    assert takes_pending == {"verify"}
    assert manifest.speculation is not None and manifest.speculation.max_draft == 3


@pytest.mark.parametrize("k", [1, 2, 3])
def test_greedy_text_is_the_same_with_and_without_drafts(model: Model, prompts: list[list[int]], k: int) -> None:
    reuse, reference = PrefixReuse(model.decoder(drafts=True)), model.decoder()
    for prompt in prompts:
        tokens, statistics = drafted(reuse, prompt, 30, k)
        assert tokens == plain(reference, prompt, 30)
        assert reuse.decoder.tokens() == reference.tokens()
    assert statistics.speculation.tokens_per_round > 1


@pytest.mark.parametrize("chunk", [1, 5, 31])
def test_what_is_drafted_does_not_depend_on_how_the_prompt_was_cut(model: Model, prompts: list[list[int]], chunk: int) -> None:
    found = []
    for size in (48, chunk):
        decoder = model.decoder(drafts=True)
        decoder.chunk = size
        tokens, statistics = drafted(PrefixReuse(decoder), prompts[3], 40, 3)
        found.append((tokens, statistics.speculation.drafted, statistics.speculation.accepted))
    assert found[0] == found[1]


def test_turns_of_a_chat_are_the_same_with_and_without_drafts(bundle: Path) -> None:
    def talk(speculate: str | int) -> tuple[list[str], bool]:
        model = load(bundle, threads=1, device="cpu", speculate=speculate)
        messages: list[dict[str, str]] = []
        answers, reused = [], 0
        for question in ("What does the function os.path.join do?", "And os.path.split?", "Thanks."):
            messages.append({"role": "user", "content": question})
            answer = model.stream(messages, enable_thinking=False, sampling=GREEDY, max_new_tokens=40)
            answers.append("".join(answer))
            messages.append({"role": "assistant", "content": answer.content})
            reused += answer.statistics.reused_tokens
        return answers, reused > 0

    assert talk("off") == talk(2) == talk("auto") == talk("lookup")


def test_a_run_without_drafts_does_not_load_their_graph(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, session = [], ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, *more, **options: opened.append(Path(path).stem) or session(path, *more, **options)
    )
    model = load(bundle, threads=1, device="cpu", speculate="off")
    assert len("".join(model.complete("def joined(path, *parts):\n    return os.path.join(", sampling=GREEDY, max_new_tokens=4))) > 0
    assert "decoder" in opened and "verify" not in opened


def test_plain_steps_leave_states_that_a_later_draft_reads(model: Model, prompts: list[list[int]]) -> None:
    """More of them than the log has room for, so that it is emptied on the way."""
    decoder, reference = model.decoder(drafts=True), model.decoder(drafts=True)
    assert decoder.head is not None and reference.head is not None
    ids = (prompts[1] + prompts[2] + prompts[3] + prompts[3] + prompts[3])[:340]
    decoder.prefill(ids[:5])
    for token in ids[5:]:
        decoder.step([token])
    reference.prefill(ids)
    first, second = (d.head.first({0: 7})[0].array.copy() for d in (decoder, reference))  # type: ignore[union-attr]
    assert abs(first - second).max() < 1e-4


def test_marks_and_snapshots_inside_a_round_are_exact(model: Model, prompts: list[list[int]]) -> None:
    def round_after(decoder: Decoder) -> list[Any]:
        assert decoder.head is not None
        drafts = [
            decoder.head.first({0: 11})[0].array.copy(),
            decoder.head.following({0: 12}, 1)[0].array.copy(),
            decoder.head.following({0: 13}, 2)[0].array.copy(),
        ]
        rows = decoder.verify([11, 12, 13, 14]).copy()
        decoder.accept(2)
        return [*drafts, rows, decoder.step([15])[0].copy()]

    decoder, other = model.decoder(drafts=True), model.decoder(drafts=True)
    decoder.prefill(prompts[1])
    decoder.verify(prompts[2][:4])
    decoder.accept(3)
    mark, snapshot = decoder.mark(), decoder.snapshot()
    first = round_after(decoder)
    decoder.rewind(mark)
    again = round_after(decoder)
    other.prefill(prompts[3])
    other.restore(snapshot)
    elsewhere = round_after(other)
    for a, b, c in zip(first, again, elsewhere, strict=True):
        assert (a == b).all() and (a == c).all()


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_decoder_share_embedding_and_lm_head(make_checkpoint: Any, tmp_path: Path, tied: bool) -> None:
    checkpoint = make_checkpoint(tiny_config(tied=tied))
    manifest = load_manifest(build(checkpoint, tmp_path / "bundle", target="onnx", max_context=64, draft_vocab=100, vision=False))
    places = {name: {weight.name: weight.offset for weight in graph.weights} for name, graph in manifest.graphs.items()}
    whole = "embed_tokens.weight" if tied else "lm_head.weight"
    for name in ("mtp", "mtp_verify"):
        assert places[name]["draft_head.weight"] == places["decoder"][whole] == places["verify"][whole]
        assert places[name]["embed_tokens.weight"] == places["decoder"]["embed_tokens.weight"]
    assert "draft_head.weight" not in places["mtp_prefill"]


def test_a_build_may_leave_the_head_out(make_checkpoint: Any, tmp_path: Path) -> None:
    bundle = build(make_checkpoint(tiny_config()), tmp_path / "bundle", target="onnx", max_context=64, mtp=False, vision=False)
    manifest = load_manifest(bundle)
    assert set(manifest.graphs) == {"decoder", "prefill"} and manifest.speculation is None
    assert "hidden" not in {tensor.name for graph in manifest.graphs.values() for tensor in graph.outputs}
