"""What rounds of drafts take on this machine, measured before the first answer: then only acceptance has to be learned from answers.

Worth it where calls are recorded: there every length has been made ready, and a round takes a millisecond or two.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.sampling.sampler import Sampler, SamplingParams
from qwen_export.runtimes.sampling.token_history import TokenHistory
from qwen_export.runtimes.speculation.acceptance import acceptance_for
from qwen_export.runtimes.speculation.drafters import Drafter, HeadDrafter

_TEXT = (0,) * 16
"""Tokens that are read first; a round costs the same whatever they are."""
_ROUNDS = 5


def make_ready(decoder: Decoder, longest: int, note: Callable[[int, float], None] | None) -> None:
    """Before the first answer, where calls are recorded: in the middle of one each kind of call would cost some hundred steps. `longest`:
    the longest draft; with `note` rounds of the draft head are measured."""
    if decoder.records:
        decoder.warm(longest)
        if note is not None and decoder.head is not None:
            measure_rounds(decoder, HeadDrafter(decoder.head), longest, note)


def measure_rounds(decoder: Decoder, drafter: Drafter, longest: int, note: Callable[[int, float], None]) -> None:
    """Call `note` with the drafts and seconds of some rounds with 0 .. `longest` drafts each. The first slot is empty before and after.

    A drafter that finds nothing to draft is left out: its lengths stay unknown."""
    sampler, rounds = Sampler(SamplingParams(greedy=True)), range(_ROUNDS)
    acceptance = acceptance_for(sampler)
    if decoder.capacity < len(_TEXT) + (longest + 1) * _ROUNDS * (longest + 1):
        return
    decoder.prefill(_TEXT, want_logits=False)
    for count in range(longest + 1):
        for _ in rounds:
            history = TokenHistory(decoder.tokens())
            history.push(0)
            began, bound = time.perf_counter(), decoder.binding_s
            drafts = drafter.draft(0, count, sampler, acceptance, history) if count else ()
            [rows] = decoder.run([Read(0, (0, *(one.token for one in drafts)), commit=not drafts, logits=1 + len(drafts))])
            for place in range(1 + len(drafts)):
                sampler.distribution(rows[place], history)
            if drafts:
                decoder.accept(1 + len(drafts))
            if len(drafts) == count:
                note(count, time.perf_counter() - began - (decoder.binding_s - bound))
    decoder.reset()
