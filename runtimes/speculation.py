"""Generation with drafts: guess a few tokens, read them all in one call, keep what the model would have said itself.

One round, with x the token sampled last, not yet read:

    d_1 .. d_k  ~ q_1 .. q_k                    the drafter's guesses after x
    p_1 .. p_k+1                                from one verify call over x, d_1 .. d_k
    keep d_i while u < p_i(d_i) / q_i(d_i)      u uniform in [0, 1)
    at the first that is not kept: the next token ~ max(p_i - q_i, 0), normalised; after all k: the next token ~ p_k+1

The tokens have exactly the distribution p (Leviathan et al. 2023, arXiv 2211.17192, theorem 1). Greedy sampling is the case in
which p and q have one token each: a draft is kept if it is the model's own choice.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import NamedTuple

from qwen_export.runtimes.decoder import Decoder
from qwen_export.runtimes.draft_policy import Policy
from qwen_export.runtimes.drafting import Drafter
from qwen_export.runtimes.generation import Request, Statistics
from qwen_export.runtimes.prefix_reuse import PrefixReuse
from qwen_export.runtimes.sampling import Distribution, Sampler, residual
from qwen_export.runtimes.token_history import TokenHistory


class _Round(NamedTuple):
    """Tokens that a round produced. After a verify the decoder has read all of them but the last."""

    tokens: list[int]
    verified: bool


class Speculator:
    """Drafts and verifies on one decoder; `policy` remembers what it measured from answer to answer."""

    def __init__(self, drafter: Drafter, policy: Policy) -> None:
        self._drafter, self._policy = drafter, policy

    def generate(self, reuse: PrefixReuse, request: Request, statistics: Statistics) -> Generator[int, None, None]:
        """As `generation.generate`: the same tokens when sampling is greedy, the same distribution when not, in fewer calls."""
        started = time.perf_counter()
        statistics.prompt_tokens = len(request.ids)
        decoder, history = reuse.decoder, TokenHistory(request.ids)
        logits, statistics.reused_tokens = reuse.read(request.ids, request.mark_at)
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
                made = self._round(decoder, made.tokens[-1], request, statistics, history)
        finally:
            # Whoever stops inside a round finds the decoder where plain decoding leaves it: the last token given out is not read yet.
            if made.verified:
                decoder.accept(emitted + 1)

    def _round(self, decoder: Decoder, x: int, request: Request, statistics: Statistics, history: TokenHistory) -> _Round:
        sampler, numbers = request.sampler, statistics.speculation
        limit = decoder.capacity - decoder.lengths[0] - 1
        if request.max_new_tokens is not None:
            limit = min(limit, request.max_new_tokens - statistics.new_tokens - 1)
        history.push(x)
        count = self._policy.length(limit)
        decoder.prepare(count + 1)
        began, busy = time.perf_counter(), decoder.busy_s
        drafts = self._drafter.draft(x, count, history) if count > 0 else ()
        drafted, draft_busy = time.perf_counter(), decoder.busy_s
        rows = decoder.verify([x, *(d.token for d in drafts)]) if drafts else decoder.step([x])
        verified, verify_busy = time.perf_counter(), decoder.busy_s
        tokens: list[int] = []
        for draft, row in zip(drafts, rows, strict=False):
            wanted = sampler.distribution(row, history)
            if not _keeps(wanted, draft.distribution, draft.token, sampler):
                tokens.append(residual(wanted, draft.distribution).draw(sampler.rng))
                break
            tokens.append(draft.token)
            history.push(draft.token)
        else:
            tokens.append(sampler.sample(rows[-1], history))
        if drafts:
            decoder.accept(len(tokens))  # x and the drafts that were kept
        self._policy.observe(len(drafts), len(tokens) - 1, drafted - began, verified - drafted)
        numbers.add(len(drafts), len(tokens) - 1, draft_busy - busy, verify_busy - draft_busy)
        numbers.host_s += time.perf_counter() - began - (verify_busy - busy)
        return _Round(tokens, verified=bool(drafts))


def _keeps(wanted: Distribution, drafted: Distribution, token: int, sampler: Sampler) -> bool:
    """Whether the draft stays. A draft that the model likes as much as the drafter did costs no random number."""
    p, q = wanted.of(token), drafted.of(token)
    return p >= q or sampler.rng.random() * q < p
