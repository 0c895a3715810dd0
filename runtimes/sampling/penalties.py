"""Bias and penalties: what is added to logits before a token is chosen. The formulas are in `sampler.py`."""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen_export.runtimes.sampling.token_history import TokenHistory

Logits = NDArray[np.floating[Any]]
_FP32 = Struct("f")


class PenaltyParams(Protocol):
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...


class Penalties:
    """`bias`: added to the logits of these tokens."""

    def __init__(self, params: PenaltyParams, bias: Mapping[int, float]) -> None:
        self._params, self._bias = params, {token: float(np.float32(value)) for token, value in bias.items()}
        self.penalizes = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        """Whether tokens that occurred count less, or more."""
        self.biased = bool(self._bias)
        raises = params.repetition_penalty < 1 or params.presence_penalty < 0 or params.frequency_penalty < 0
        self.may_raise = raises or any(value > 0 for value in self._bias.values())
        """Whether a logit can become larger than it was."""

    def changed(self, x: Logits, history: TokenHistory | None) -> Logits:
        """Logits of all tokens; `x` stays as it is."""
        penalizes = self.penalizes and history is not None
        if not self.biased and not penalizes:
            return x
        x = x.copy()
        for token, bias in self._bias.items():
            if token < len(x):  # a draft head may know fewer
                x[token] += x.dtype.type(bias)
        return self._penalized(x, history) if penalizes and history is not None else x

    def changed_one(self, token: int, x: float, history: TokenHistory | None) -> float:
        """The same for one fp32 logit, to the last bit."""
        if token in self._bias:
            x = _fp32(x + self._bias[token])
        if history is None or not self.penalizes:
            return x
        params, (seen, count) = self._params, history.of(token)
        if seen and params.repetition_penalty != 1:
            factor = _fp32(params.repetition_penalty)
            x = _fp32(x * factor if x < 0 else x / factor)
        if count and (params.presence_penalty != 0 or params.frequency_penalty != 0):
            x = _fp32(x - (params.presence_penalty + params.frequency_penalty * count))
        return x

    def _penalized(self, x: Logits, history: TokenHistory) -> Logits:
        """In place."""
        params = self._params
        if params.repetition_penalty != 1:
            ids = history.seen()
            ids = ids[ids < len(x)]
            x[ids] = np.where(x[ids] < 0, x[ids] * params.repetition_penalty, x[ids] / params.repetition_penalty)
        if params.presence_penalty != 0 or params.frequency_penalty != 0:
            ids, counts = history.generated()
            ids, counts = ids[ids < len(x)], counts[ids < len(x)]
            x[ids] -= params.presence_penalty + params.frequency_penalty * counts
        return x


def _fp32(x: float) -> float:
    """Rounded to fp32. Products and quotients of two fp32 numbers come out as if fp32 had made them: fp64 is wide enough."""
    return float(_FP32.unpack(_FP32.pack(x))[0])
