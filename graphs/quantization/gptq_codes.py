"""Codes that keep the outputs of a product instead of its weights: GPTQ (Frantar et al., arXiv 2210.17323).

Columns are rounded one after the other, and the error of each is taken up by those that are still open. With H = sum x x^T over the inputs
of a calibration text, and U the upper triangular factor of H^-1 = U^T U, column j of W [N,K] is rounded to q_j, and

    e_j = (w_j - q_j) / U_jj        w_k <- w_k - U_jk e_j  for all k that come later

From n tokens the products of different inputs are known the worse the larger K is: off the diagonal H is taken at n / (n + K) of its value.
Without it 64 to 1000 tokens made matrices of 512 columns up to twice as bad as a search does on inputs that are independent; with it no
number of tokens did. Scales and zeros are found before, with the search that needs no text, but for errors weighted by the diagonal of H.
So columns may be taken in any order: the one with the largest inputs first, while there is most left to correct it with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen_export.graphs.quantization.packing import Array, Bytes, Floats, QuantFormat
from qwen_export.graphs.quantization.scale_search import quantize

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean: directions in which the text has no inputs."""
_BLOCK = 128
# Columns whose corrections are applied to the rest together.


class InputMoments:
    """H f32[K,K] of the inputs of a product, and from how many tokens."""

    def __init__(self, K: int) -> None:
        self.sum = torch.zeros(K, K)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x f32[...,K]."""
        rows = x.reshape(-1, x.shape[-1])
        self.sum.addmm_(rows.T, rows)
        self.tokens += len(rows)

    def feedback(self) -> Feedback:
        """For all matrices that read these inputs. Uses up the sum."""
        H, K = self.sum, len(self.sum)
        diagonal = H.diagonal().clone()
        # What n tokens show of how K inputs go together is noise as far as n is small against K.
        share = self.tokens / max(1, self.tokens + K)
        H.mul_(share).diagonal().add_((1 - share) * diagonal)
        order = torch.argsort(diagonal, descending=True, stable=True)
        damping = DAMPING * float(diagonal.mean()) or 1.0
        importance = (diagonal + damping).numpy()
        H = H[order][:, order]
        H.diagonal().add_(damping)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
        return Feedback(order, torch.linalg.cholesky(inverse, upper=True), importance)


@dataclass(frozen=True)
class Feedback:
    """`order` i64[K]: in which columns are rounded. `upper` f32[K,K]: U, in that order. `importance` f32[K]: the diagonal of H, of the
    columns as they are."""

    order: Tensor
    upper: Tensor
    importance: Floats


def quantize_for_inputs(format: QuantFormat, values: Floats, feedback: Feedback) -> tuple[Bytes, Array, Bytes | None]:
    """values f32[N,K] -> codes, scales and zeros, as `quantize` gives them."""

    _, scales, zeros = quantize(format, values, "search", importance=feedback.importance)
    N, K = values.shape
    group = (feedback.order // format.block).numpy()
    by_column = torch.from_numpy(np.ascontiguousarray(scales.astype(np.float32).T[group]))
    middle = torch.full((1, 1), float(format.offset)) if zeros is None else torch.from_numpy(zeros.astype(np.float32).T[group].copy())
    inverse = torch.where(by_column.abs() > 1e-37, 1 / by_column, torch.zeros(()))
    w = torch.from_numpy(np.ascontiguousarray(values.T))[feedback.order]
    codes = torch.empty(K, N, dtype=torch.uint8)
    upper, top = feedback.upper, float((1 << format.bits) - 1)
    for start in range(0, K, _BLOCK):
        stop = min(K, start + _BLOCK)
        errors = torch.empty(stop - start, N)
        for j in range(start, stop):
            zero = middle[j if zeros is not None else 0]
            q = (w[j] * inverse[j]).round_().add_(zero).clamp_(0, top)
            codes[j] = q
            errors[j - start] = (w[j] - (q - zero) * by_column[j]) / upper[j, j]
            w[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
        w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    back = torch.empty_like(codes)
    back[feedback.order] = codes
    return np.ascontiguousarray(back.numpy().T), scales, zeros
