"""Answers of a decoder with and without drafts, below the level of text."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_export.runtimes import SamplingParams
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.generation import Request, Statistics, generate
from qwen_export.runtimes.decoding.prefix_reuse import PrefixReuse
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.speculation.draft_policy import FixedLength
from qwen_export.runtimes.speculation.drafters import HeadDrafter
from qwen_export.runtimes.speculation.rounds import Speculator

GREEDY = SamplingParams(greedy=True)


def plain(decoder: Decoder, prompt: Sequence[int], count: int, sampling: SamplingParams = GREEDY, stop: Sequence[int] = ()) -> list[int]:
    return list(generate(PrefixReuse(decoder), Request(prompt, Sampler(sampling), stop, count), Statistics()))


def drafted(
    decoder: Decoder, prompt: Sequence[int], count: int, k: int, sampling: SamplingParams = GREEDY, stop: Sequence[int] = ()
) -> tuple[list[int], Statistics]:
    """The same with `k` drafts of the head in each round."""
    assert decoder.head is not None
    request, statistics = Request(prompt, Sampler(sampling), stop, count), Statistics()
    speculator = Speculator(HeadDrafter(decoder.head), FixedLength(k))
    return list(speculator.generate(PrefixReuse(decoder), request, statistics)), statistics
