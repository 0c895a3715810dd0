"""A constraint holds for every token of an answer, with drafts and without, and changes nothing where it allows everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_export.errors import QwenExportError
from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.sampling.sampler import Sampler

SAMPLINGS = [SamplingParams(greedy=True), SamplingParams(temperature=1.0, top_k=20, seed=5), SamplingParams(temperature=1.0, seed=5)]


class ByRemainder:
    """Token n of the answer leaves remainder n % 3 when divided by 3."""

    def __init__(self, vocabulary: int) -> None:
        self._remainders = np.arange(vocabulary) % 3

    def allowed(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self._remainders == len(tokens) % 3


class Everything:
    def allowed(self, tokens: NDArray[np.int64]) -> None:
        return None


class Nothing:
    def allowed(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.zeros(10**6, np.bool_)


def answer(model: Model, sampling: SamplingParams, constraint: ByRemainder | Everything | Nothing | None) -> list[int]:
    ids = model.tokenizer.encode("import os\n\n\ndef read_lines(path):\n")
    sampler = Sampler(sampling, model.tokenizer.vocab_size, (), constraint)
    return list(model.generate(Request(ids, sampler, (), 24), Statistics()))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_token_is_allowed_with_drafts_and_without(demo_bundle: Path, sampling: SamplingParams) -> None:
    texts = []
    for speculate in ("off", 3, "lookup"):
        model = load(demo_bundle, threads=1, max_context=128, speculate=speculate)
        texts.append(answer(model, sampling, ByRemainder(model.tokenizer.vocab_size)))
        assert [token % 3 for token in texts[-1]] == [n % 3 for n in range(24)]
        assert answer(model, sampling, Everything()) == answer(model, sampling, None)
    assert texts[0] == texts[1] == texts[2]


def test_a_constraint_that_allows_nothing_is_an_error(demo_bundle: Path) -> None:
    model = load(demo_bundle, threads=1, max_context=128)
    with pytest.raises(QwenExportError, match="allows no token"):
        answer(model, SAMPLINGS[0], Nothing())
