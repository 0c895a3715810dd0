"""Generation with drafts: guess a few tokens, read them all in one call, keep what the model would have said itself.

One round, with x the token sampled last, not yet read:

    d_1 .. d_k  ~ q_1 .. q_k                    the drafter's guesses after x
    p_1 .. p_k+1                                from one verify call over x, d_1 .. d_k
    keep d_1, d_2, ... as `acceptance` says, up to the first that is another token; after all k: one more token ~ p_k+1
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import NamedTuple

from qwen_export.runtimes.acceptance import Acceptance, acceptance_for
from qwen_export.runtimes.decoder import Decoder
from qwen_export.runtimes.draft_policy import Policy
from qwen_export.runtimes.drafting import Drafter
from qwen_export.runtimes.generation import Request, Statistics
from qwen_export.runtimes.prefix_reuse import PrefixReuse
from qwen_export.runtimes.sampling import Sampler
from qwen_export.runtimes.token_history import TokenHistory


class _Round(NamedTuple):
    """Tokens that a round produced. After a verify the decoder has read all of them but the last."""

    tokens: list[int]
    verified: bool


class Speculator:
    """Drafts and verifies on one decoder; `policy` remembers what it measured from answer to answer."""

    def __init__(self, drafter: Drafter, policy: Policy, acceptance: Callable[[Sampler], Acceptance] = acceptance_for) -> None:
        self._drafter, self._policy, self._acceptance = drafter, policy, acceptance

    def generate(self, reuse: PrefixReuse, request: Request, statistics: Statistics) -> Generator[int, None, None]:
        """As `generation.generate`: the same tokens when sampling is greedy, the same distribution when not, in fewer calls."""
        started = time.perf_counter()
        statistics.prompt_tokens = len(request.ids)
        decoder, history = reuse.decoder, TokenHistory(request.ids)
        logits, statistics.reused_tokens = reuse.read(request.ids, request.mark_at)
        acceptance = self._acceptance(request.sampler)
        made, emitted = _Round([request.sampler.sample(logits, history)], verified=False), 0
        try:
            while True:
                statistics.total_s = time.perf_counter() - started
                statistics.first_token_s = statistics.first_token_s or statistics.total_s
                for emitted, token in enumerate(made.tokens):  # noqa: B007 - read in `finally`
                    if token in request.stop_ids:
                        statistics.finish = "stop"
                        return
                    statistics.new_tokens += 1
                    if statistics.new_tokens == request.max_new_tokens:
                        statistics.finish = "length"
                    yield token
                    if request.cancelled.is_set():
                        statistics.finish = "cancelled"
                    if statistics.finish:
                        return
                made = self._round(decoder, made.tokens[-1], request, acceptance, statistics, history)
        finally:
            # Whoever stops inside a round finds the decoder where plain decoding leaves it: the last token given out is not read yet.
            if made.verified:
                decoder.accept(emitted + 1)

    def _round(
        self, decoder: Decoder, x: int, request: Request, acceptance: Acceptance, statistics: Statistics, history: TokenHistory
    ) -> _Round:
        sampler, numbers = request.sampler, statistics.speculation
        limit = decoder.capacity - decoder.lengths[0] - 1
        if request.max_new_tokens is not None:
            limit = min(limit, request.max_new_tokens - statistics.new_tokens - 1)
        history.push(x)
        count = self._policy.length(limit)
        decoder.prepare(count + 1)
        began, busy, binding = time.perf_counter(), decoder.busy_s, decoder.binding_s
        drafts = self._drafter.draft(x, count, sampler, acceptance, history) if count > 0 else ()
        drafted, draft_busy = time.perf_counter(), decoder.busy_s
        rows = decoder.verify([x, *(d.token for d in drafts)]) if drafts else decoder.step([x])
        verify_busy = decoder.busy_s
        tokens: list[int] = []
        for draft, row in zip((*drafts, None), rows, strict=True):
            tokens.append(acceptance.token(sampler.distribution(row, history), draft, len(tokens)))
            if draft is None or tokens[-1] != draft.token:
                break
            history.push(draft.token)
        acceptance.advance(len(tokens))
        if drafts:
            decoder.accept(len(tokens))  # x and the drafts that were kept
        once = decoder.binding_s - binding  # bindings made for the first draft of its kind
        ended = time.perf_counter()
        self._policy.observe(len(drafts), len(tokens) - 1, drafted - began - once, ended - drafted)
        numbers.add(len(drafts), len(tokens) - 1, draft_busy - busy, verify_busy - draft_busy)
        numbers.host_s += ended - began - once - (verify_busy - busy)
        return _Round(tokens, verified=bool(drafts))
