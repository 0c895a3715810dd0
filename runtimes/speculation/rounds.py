"""Generation with drafts: guess a few tokens, read them all in one call, keep what the model itself would have chosen.

One round, with x the token sampled last, not yet read:

    d_1 .. d_k  ~ q_1 .. q_k                    the drafter's guesses after x
    p_1 .. p_k+1                                from one verify call over x, d_1 .. d_k
    keep d_1, d_2, ... as `acceptance` decides, up to the first that is another token; after all k: one more token ~ p_k+1
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence

from qwen_export.runtimes.decoding.generation import NextRound, Request, Round, Statistics, generate
from qwen_export.runtimes.decoding.prefix_reuse import PrefixReuse
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.sampling.token_history import TokenHistory
from qwen_export.runtimes.speculation.acceptance import Acceptance, Draft, acceptance_for
from qwen_export.runtimes.speculation.draft_policy import Policy
from qwen_export.runtimes.speculation.drafters import Drafter, forced_drafts


class Speculator:
    """Drafts and verifies on one decoder; `policy` remembers what it measured from answer to answer."""

    def __init__(self, drafter: Drafter, policy: Policy, acceptance: Callable[[Sampler], Acceptance] = acceptance_for) -> None:
        self._drafter, self._policy, self._acceptance = drafter, policy, acceptance

    def generate(self, reuse: PrefixReuse, request: Request, statistics: Statistics) -> Generator[int, None, None]:
        """As `generation.generate`: the same tokens when sampling is greedy, the same distribution when not, in fewer calls."""
        return generate(reuse, request, statistics, self._rounds)

    def _rounds(self, reuse: PrefixReuse, request: Request, statistics: Statistics, history: TokenHistory) -> NextRound:
        acceptance = self._acceptance(request.sampler)
        self._drafter.begin()
        return lambda token: self._round(reuse, token, request, acceptance, statistics, history)

    def _round(
        self, reuse: PrefixReuse, x: int, request: Request, acceptance: Acceptance, statistics: Statistics, history: TokenHistory
    ) -> Round:
        decoder, slot, sampler, numbers = reuse.decoder, reuse.slot, request.sampler, statistics.speculation
        entered, entry_busy, entry_binding = time.perf_counter(), decoder.busy_s, decoder.binding_s
        limit = decoder.capacity - decoder.sequences[slot].length - 1
        if request.max_new_tokens is not None:
            limit = min(limit, request.max_new_tokens - statistics.new_tokens - 1)
        history.push(x)
        count = self._policy.length(limit)
        forced = forced_drafts(sampler, history, min(limit, decoder.widest_verify - 1), count)
        decoder.prepare(1 + (len(forced) or count))
        began, busy, binding = time.perf_counter(), decoder.busy_s, decoder.binding_s
        drafts: Sequence[Draft] = forced
        if count > 0 and not forced:
            sampler.ahead(history)
            drafts = self._drafter.draft(x, count, sampler, acceptance, history)
        sampler.ahead(history, [draft.token for draft in drafts])
        draft_busy = decoder.busy_s
        read = Read(slot, (x, *(d.token for d in drafts)), commit=not drafts, logits=1 + len(drafts))
        [rows] = decoder.run([read])
        verify_busy = decoder.busy_s
        tokens: list[int] = []
        try:
            for row, draft in enumerate((*drafts, None)):
                tokens.append(acceptance.token(sampler.distribution(rows[row], history), draft, len(tokens)))
                sampler.chosen(rows[row], tokens[-1])
                if draft is None or tokens[-1] != draft.token:
                    break
                history.push(draft.token)
        except BaseException:
            if drafts:  # as before the round: x is not read
                decoder.accept(0, slot)
            raise
        acceptance.advance(len(tokens))
        if drafts:
            decoder.accept(len(tokens), slot)  # x and the drafts that were kept
        if not forced:  # without the bindings made for the first draft, or verify, of its kind
            self._policy.observe(len(drafts), len(tokens) - 1, time.perf_counter() - began - (decoder.binding_s - binding))
        numbers.add(len(drafts), len(tokens) - 1, draft_busy - busy, verify_busy - draft_busy)
        spent, worked, bound = time.perf_counter() - entered, verify_busy - entry_busy, decoder.binding_s - entry_binding
        numbers.host_s += spent - worked - bound
        return Round(tokens, verified=bool(drafts))
