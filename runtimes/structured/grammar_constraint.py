"""A grammar as a constraint of one answer: follows its tokens, and says which may come next.

One matcher follows the settled tokens and only goes forward; drafts are followed by a copy of it. Matchers can roll back, but llguidance
1.9.1 then now and then gives masks of another text. Masks are kept for as long as the tokens before them are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qwen_export.errors import QwenExportError
from qwen_export.runtimes.sampling.token_set import TokenSet
from qwen_export.runtimes.structured.mask_worker import in_background
from qwen_export.runtimes.structured.token_table import TokenTable

if TYPE_CHECKING:
    from llguidance import LLMatcher

Tokens = NDArray[np.int64]
_KEPT = 64
"""Masks behind the last one that are kept: no round of drafts goes back further."""


class GrammarConstraint:
    """`matcher` is at the start of the answer; it is copied, and stays there."""

    def __init__(self, matcher: LLMatcher, table: TokenTable) -> None:
        from llguidance import LLExecutor

        self._start, self._stop_ids, self._words = matcher, table.stop_ids, table.words
        self._executor = LLExecutor(1)
        self._path: Tokens = np.empty(256, np.int64)
        self._length = 0
        """Tokens in `_path`, to which the masks belong."""
        self._settled, self._settled_at = matcher.deep_copy(), 0
        """A matcher, and how many tokens of the path it has taken."""
        self._tip: LLMatcher | None = None
        self._tip_at = 0
        """The same behind drafts."""
        self._masks: dict[int, TokenSet] = {}
        """By the number of tokens before them."""
        self._lock = Lock()

    def allowed(self, tokens: Tokens) -> TokenSet | None:
        """See Constraint. Behind a stop token there is no answer, and everything is allowed."""
        with self._lock:
            if not self._show(tokens):
                return None
            if len(tokens) not in self._masks:
                self._masks[len(tokens)] = self._made(len(tokens))
            return self._masks[len(tokens)]

    def forced(self, tokens: Tokens) -> Sequence[int]:
        with self._lock:
            if not self._settle(tokens) or self._settled.is_stopped():
                return ()
            found: list[int] = self._settled.compute_ff_tokens()
            return found

    def fitting(self, tokens: Tokens, drafts: Sequence[int]) -> int:
        with self._lock:
            if not self._settle(tokens) or self._settled.is_stopped():
                return 0
            count: int = self._settled.deep_copy().try_consume_tokens(self._before_end(drafts))
            return count

    def ahead(self, tokens: Tokens, drafts: Sequence[int]) -> None:
        wanted = np.concatenate([tokens, np.asarray(self._before_end(drafts), np.int64)])
        in_background(lambda: self._make_ahead(len(tokens), wanted))

    def _make_ahead(self, start: int, tokens: Tokens) -> None:
        with self._lock:
            if self._settle(tokens[:start]) and self._show(tokens):
                for place in range(start, len(tokens) + 1):
                    if place not in self._masks:
                        self._masks[place] = self._made(place)

    def _before_end(self, tokens: Sequence[int]) -> list[int]:
        """Those before the first that ends the answer."""
        end = next((at for at, token in enumerate(tokens) if token in self._stop_ids), len(tokens))
        return list(tokens[:end])

    def _show(self, tokens: Tokens) -> bool:
        """Make the path go through `tokens`; False where these end the answer."""
        common = min(len(tokens), self._length)
        same = self._path[:common] == tokens[:common]
        if not same.all():
            common = int(same.argmin())
        new = tokens[common:]
        if not len(new):
            return True
        if not self._stop_ids.isdisjoint(new.tolist()):
            return False
        if self._tip_at > common:
            self._tip, self._tip_at = None, 0
        if self._settled_at > common:  # the caller has gone back further than a round does
            self._settled, self._settled_at = self._start.deep_copy(), 0
        if len(tokens) > len(self._path):
            self._path = np.concatenate([self._path[:common], np.empty(2 * len(tokens) - common, np.int64)])
        self._path[common : len(tokens)] = new
        self._length = len(tokens)
        self._masks = {place: mask for place, mask in self._masks.items() if common - _KEPT < place <= common}
        return True

    def _settle(self, tokens: Tokens) -> bool:
        """These tokens stay; False where they end the answer or are not of the grammar."""
        if not self._show(tokens):
            return False
        if self._settled_at < len(tokens):
            if self._tip is not None and self._tip_at == len(tokens):
                self._settled, self._settled_at, self._tip, self._tip_at = self._tip, self._tip_at, None, 0
            else:
                self._settled_at += self._settled.try_consume_tokens(self._path[self._settled_at : len(tokens)].tolist())
        return self._settled_at == len(tokens) and not self._settled.is_error()

    def _at(self, place: int) -> LLMatcher | None:
        """A matcher behind `place` tokens of the path; None where they are not of the grammar."""
        if self._settled_at == place:
            return self._settled
        if self._tip is None or self._tip_at > place:
            behind = self._settled_at > place
            self._tip, self._tip_at = (self._start.deep_copy(), 0) if behind else (self._settled.deep_copy(), self._settled_at)
        self._tip_at += self._tip.try_consume_tokens(self._path[self._tip_at : place].tolist())
        return self._tip if self._tip_at == place else None

    def _made(self, place: int) -> TokenSet:
        """The mask behind `place` tokens of the path, empty where they are not of the grammar."""
        words = np.zeros((1, self._words), np.uint32)
        matcher = self._at(place)
        if matcher is not None:
            self._executor.unsafe_compute_mask_ptr([(matcher, 0)], words.ctypes.data, 4 * self._words, 1)
            if matcher.is_error():
                raise QwenExportError(
                    "the grammar of the answer cannot be followed further",
                    got=matcher.get_error().splitlines()[0][:300],
                    fix="Simplify the grammar or the schema: it has more readings than llguidance keeps.",
                )
        return TokenSet(words[0])
