"""What the text of an answer must obey, token by token: a grammar, a schema, a list of choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qwen_export.runtimes.sampling.token_set import TokenSet


class Constraint(Protocol):
    """Belongs to one answer. A pure function of its tokens, so drafts that are taken back need no rollback here; an implementation that
    keeps a state compares the tokens with those it has followed. `tokens` are those of the answer so far, i64[n], in every method."""

    def allowed(self, tokens: NDArray[np.int64]) -> TokenSet | NDArray[np.bool_] | None:
        """Which tokens may follow: a set, or bool[V'] where V' covers the tokenizer; None: all of them."""


@runtime_checkable
class ForeseeingConstraint(Constraint, Protocol):
    """A constraint that knows more than the next token. What it says here changes no distribution, only how soon tokens are there."""

    def forced(self, tokens: NDArray[np.int64]) -> Sequence[int]:
        """Tokens that follow almost certainly, empty where there is a choice: they are drafts that need no drafter."""

    def fitting(self, tokens: NDArray[np.int64], drafts: Sequence[int]) -> int:
        """How many of `drafts`, from the first on, may follow."""

    def ahead(self, tokens: NDArray[np.int64], drafts: Sequence[int]) -> None:
        """`allowed` will be called for `tokens`, and for them with each beginning of `drafts` behind: the device works meanwhile."""
