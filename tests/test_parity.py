"""The eager decoder and compiled bundles against transformers, in fp32, on random checkpoints with perturbed norms.

Logits of these checkpoints have a standard deviation of about 0.6.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qwen_export import build
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.config import FULL
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.graphs.models.model_state import empty_state
from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.decoder import Decoder
from tests.support.family import FAMILY, tiny_config
from tests.support.references import reference_model
from tests.support.synthesize import synthesize

TOLERANCE = 1e-4
CAPACITY = 160
Logits = npt.NDArray[np.float32]


def small_release_config() -> dict[str, Any]:
    """The 0.8B's layers, four of them, over a small vocabulary."""
    config = copy.deepcopy(FAMILY["0.8B"])
    text = config["text_config"]
    text |= {"num_hidden_layers": 4, "layer_types": text["layer_types"][:4], "vocab_size": 1024, "eos_token_id": 992}
    config["vision_config"] |= {"depth": 1}
    return config


def tiny(**options: Any) -> dict[str, Any]:
    """Linear heads of 32 instead of 16. In a narrow head the outputs of some token may all but cancel, and the norm behind them amplifies
    rounding: with 16, transformers itself was once 2e-4 off its float64 logits."""
    return tiny_config(linear_key_head_dim=32, linear_value_head_dim=32, **options)


def yarn_config() -> dict[str, Any]:
    """Context stretched fourfold from 32 tokens, so that every prompt here is in stretched territory."""
    config = tiny(value_ratio=8, query_ratio=4, tied=True)
    text = config["text_config"]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    text["rope_parameters"] = {**text["rope_parameters"], **yarn}
    return config


# Every head ratio of the family, paired up: value heads per key head, query heads per key/value head.
SHAPES: dict[str, Callable[[], dict[str, Any]]] = {
    "1x4": lambda: tiny(value_ratio=1, query_ratio=4),
    "2x6-flat-tied": lambda: tiny(value_ratio=2, query_ratio=6, vision=False, tied=True),
    "3x8": lambda: tiny(value_ratio=3, query_ratio=8, tied=True),
    "4x16-flat": lambda: tiny(value_ratio=4, query_ratio=16, vision=False),
    "8x4-yarn": yarn_config,
    "0.8B-layers": small_release_config,
}


@dataclass
class Subject:
    """One checkpoint three times over."""

    checkpoint: Path
    bundle: Path
    reference: Any
    eager: Any
    threads: int

    def decoder(self, batch: int = 1) -> Decoder:
        return load(self.bundle, max_context=CAPACITY, threads=self.threads).decoder(batch)

    def sequence(self) -> EagerSequence:
        return EagerSequence(self.eager, CAPACITY)

    @torch.no_grad()
    def expected(self, ids: list[int]) -> Logits:
        """Logits of all tokens, by transformers."""
        return self.reference(torch.tensor([ids])).logits[0].numpy()


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, 480, length).tolist()


def error(got: Logits, expected: Logits) -> float:
    assert got.shape == expected.shape
    assert 0.3 < expected.std() < 1.5
    return float(np.abs(got - expected).max())


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The eager modules work token by token on small tensors, where threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Each of their ratios is also one of another shape's, but for the 16 query heads per key/value head.
SLOW = ("1x4", "4x16-flat")


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SHAPES])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    directory = tmp_path_factory.mktemp(f"parity-{request.param}")
    checkpoint = synthesize(SHAPES[request.param](), directory / "checkpoint", with_mtp=False)
    bundle = build(checkpoint, directory / "bundle", max_context=CAPACITY)
    threads = 2 if request.param == "0.8B-layers" else 1
    yield Subject(checkpoint, bundle, reference_model(checkpoint), load_decoder(open_checkpoint(checkpoint)), threads)


def test_prefill(subject: Subject) -> None:
    for length in (1, 2, 3, 17, 100):
        ids = prompt(length)
        expected = subject.expected(ids)
        assert error(subject.decoder().read(ids), expected) <= TOLERANCE
        assert error(subject.sequence().read(ids), expected) <= TOLERANCE
        assert error(subject.decoder().prefill(ids), expected[-1]) <= TOLERANCE


def test_chunked_prefill_at_any_split(subject: Subject) -> None:
    ids = prompt(24, 3)
    expected, decoder = subject.expected(ids), subject.decoder()
    for cut in range(1, 24):
        decoder.reset()
        first = decoder.read(ids[:cut]).copy()
        assert error(np.concatenate([first, decoder.read(ids[cut:])]), expected) <= TOLERANCE
    for chunk in (1, 2, 3, 5, 24, 1000):
        decoder.reset()
        assert error(decoder.prefill(ids, chunk=chunk), expected[-1]) <= TOLERANCE
    for cut in (1, 3, 11):
        sequence = subject.sequence()
        assert error(np.concatenate([sequence.read(ids[:cut]), sequence.read(ids[cut:])]), expected) <= TOLERANCE


def test_decode_token_by_token(subject: Subject) -> None:
    """Against one call of transformers over the whole text, and against its own cached decoding."""
    ids = prompt(30)
    expected, decoder, sequence = subject.expected(ids), subject.decoder(), subject.sequence()
    steps = np.concatenate([decoder.step([token]).copy() for token in ids])
    assert error(steps, expected) <= TOLERANCE
    assert error(np.concatenate([sequence.read([token]) for token in ids]), expected) <= TOLERANCE
    cached = cached_decode(subject.reference, ids, 10)
    assert error(cached, expected[9:]) <= TOLERANCE
    assert error(steps[9:], cached) <= TOLERANCE


@torch.no_grad()
def cached_decode(model: Any, ids: list[int], first: int) -> Logits:
    """transformers' logits of token first-1 and of those after it, which are read one at a time."""
    result = model(torch.tensor([ids[:first]]), use_cache=True)
    rows = [result.logits[:, -1]]
    for token in ids[first:]:
        result = model(torch.tensor([[token]]), past_key_values=result.past_key_values, use_cache=True)
        rows.append(result.logits[:, -1])
    return torch.cat(rows).numpy()


def test_a_batch_of_prompts_of_different_lengths(subject: Subject) -> None:
    """Prompts read one by one, then joint steps; each sequence as transformers reads it alone, and as a decoder of its own does."""
    prompts, steps = [prompt(21, 1), prompt(4, 2), prompt(33, 3)], 8
    texts = [[*ids, *prompt(steps, 10 + i)] for i, ids in enumerate(prompts)]
    batch = subject.decoder(3)
    rows = [[batch.prefill(ids, slot=i).copy()] for i, ids in enumerate(prompts)]
    for t in range(steps):
        logits = batch.step([text[len(ids) + t] for text, ids in zip(texts, prompts, strict=True)])
        for i in range(3):
            rows[i].append(logits[i].copy())
    assert batch.lengths == [29, 12, 41]
    for i, (text, ids) in enumerate(zip(texts, prompts, strict=True)):
        got = np.stack(rows[i])
        assert error(got, subject.expected(text)[len(ids) - 1 :]) <= TOLERANCE
        alone = subject.decoder()
        single = np.concatenate([alone.prefill(ids)[None].copy(), *(alone.step([token]).copy() for token in text[len(ids) :])])
        assert np.array_equal(got[0], single[0])
        # Steps of three sequences multiply matrices in another order than steps of one.
        assert error(got, single) <= TOLERANCE / 2


def test_greedy_tokens(subject: Subject, record_property: Callable[[str, object], None]) -> None:
    """Equal to transformers' unless its own two best tokens are closer than the tolerance, and then one of the two."""
    ids, ties = prompt(12, 4), 0
    decoder, chosen = subject.decoder(), []
    logits = decoder.prefill(ids)
    for _ in range(32):
        chosen.append(int(logits.argmax()))
        logits = decoder.step(chosen[-1:])[0]
    for row, token in zip(subject.expected([*ids, *chosen])[len(ids) - 1 : -1], chosen, strict=True):
        gap = row.max() - row[token]
        assert gap <= 2 * TOLERANCE
        ties += bool(gap > 0)
    record_property("near_ties", ties)
    assert ties <= 1, "near-ties are rare"


def test_states_are_the_eager_ones_and_matter(subject: Subject) -> None:
    """Each layer's state after a prompt equals the eager module's; the next token depends on every one of them."""
    ids = prompt(19)
    decoder, sequence = subject.decoder(), subject.sequence()
    after = decoder.prefill(ids).copy()
    sequence.read(ids)
    for i, layer in enumerate(sequence.state):
        for key in layer.keys() & {"conv_history", "recurrent", "k_cache", "v_cache"}:
            got = decoder.states[f"layers.{i}.{key}"].array()
            assert np.abs(got - layer[key].numpy()).max() < TOLERANCE
            assert np.abs(got).max() > 1e-2
    fresh = subject.decoder().step(ids[-1:])[0].copy()
    assert error(after, fresh) > 0.05

    mark = decoder.mark()
    true_step = decoder.step([7])[0].copy()
    for name in decoder.states:
        decoder.rewind(mark)
        buffer = decoder.states[name]
        kept = buffer.read()
        buffer.write(np.zeros_like(kept))
        assert error(decoder.step([7])[0], true_step) > 1e-4, f"{name} is not used"
        buffer.write(kept)
    decoder.rewind(mark)
    assert np.array_equal(decoder.step([7])[0], true_step)


def test_a_verify_call_leaves_the_state_for_the_next_call_to_commit(subject: Subject) -> None:
    """The eager decoder with commit 0 and the kept tokens accepted later reads as if it had read the kept tokens only."""
    ids, draft, kept = prompt(9), prompt(4, 5), 2
    expected = subject.expected([*ids, *draft])
    other = prompt(3, 6)
    expected_after = subject.expected([*ids, *draft[:kept], *other])
    sequence = subject.sequence()
    sequence.read(ids)
    state = sequence.state
    with torch.no_grad():
        logits, hidden, state = call(sequence, draft, len(ids), state, accepted=0, commit=0)
        assert error(logits, expected[len(ids) :]) <= TOLERANCE
        assert hidden.shape == (1, 4, subject.eager.config.hidden_size)
        logits, _, state = call(sequence, other, len(ids) + kept, state, accepted=kept, commit=3)
        assert error(logits, expected_after[len(ids) + kept :]) <= TOLERANCE
    plain = subject.sequence()
    plain.read([*ids, *draft[:kept], *other])
    for got, wanted in zip(state, plain.state, strict=True):
        for key in got.keys() & {"conv_history", "recurrent"}:
            torch.testing.assert_close(got[key], wanted[key], atol=1e-5, rtol=0)


def call(sequence: EagerSequence, ids: list[int], length: int, state: Any, accepted: int, commit: int) -> tuple[Logits, Any, Any]:
    rows = torch.arange(len(ids))
    counts = (torch.tensor([length]), torch.tensor([accepted]), torch.tensor([commit]))
    logits, hidden, after = sequence.model(torch.tensor([ids]), sequence.cos, sequence.sin, *counts, rows, state)
    return logits.numpy(), hidden, after


def test_only_wanted_logits_are_computed(subject: Subject) -> None:
    ids = prompt(6)
    sequence = subject.sequence()
    state = empty_state(subject.eager.config, 1, CAPACITY)
    zero, rows = torch.tensor([0]), torch.tensor([5, 1])
    with torch.no_grad():
        logits, _, _ = subject.eager(torch.tensor([ids]), sequence.cos, sequence.sin, zero, zero, torch.tensor([6]), rows, state)
    assert error(logits.numpy(), subject.expected(ids)[[5, 1]]) <= TOLERANCE


def test_every_ratio_and_layout_is_among_the_shapes() -> None:
    texts = [make().get("text_config", make()) for make in SHAPES.values()]
    assert {t["linear_num_value_heads"] // t["linear_num_key_heads"] for t in texts} == {1, 2, 3, 4, 8}
    assert {t["num_attention_heads"] // t["num_key_value_heads"] for t in texts} == {4, 6, 8, 16}
    assert {t["tie_word_embeddings"] for t in texts} == {True, False}
    assert {"text_config" in make() for make in SHAPES.values()} == {True, False}
    assert all(FULL in t["layer_types"] for t in texts)
