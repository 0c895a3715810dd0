"""What the text of an answer must obey, token by token: a grammar, a schema, a list of choices."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """Belongs to one answer. A pure function of its tokens, so drafts that are taken back need no rollback here; an implementation that
    keeps a state compares the tokens with those it has followed."""

    def allowed(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Which tokens may follow `tokens` i64[n] of the answer: bool[V'], where V' covers the tokenizer; None: all of them."""
