"""The inverse of I + A for strictly lower triangular A, by block recursion written with masks.

    X <- I - A * M_1;   for b = 2, 4, ... < L:   X <- X - X (A * M_b) X

M_b selects the lower left b x b block of every diagonal block of 2b rows. Before the step, X holds the inverses X1, X2 of the diagonal
blocks of b rows; the step adds -X2 A21 X1 below the diagonal, which is what the inverse of a block triangular matrix has there. Two
matrix products a level, no level for b = 1, any L, and only MatMul, Mul and Sub.

Accuracy. In the delta rule A[i,j] = beta_i d_ij k_i.k_j with |k| = 1, 0 <= beta <= 1 and decays 0 <= d <= 1. Then
X[i,j] = -beta_i k_i^T (prod of (1 - beta_m k_m k_m^T) e^g_m) k_j is a product of contractions, so |X[i,j]| <= 1, and likewise every entry
of X2 A21 and A21 X1 is at most 1. With the rounding model of Du Croz and Higham, Stability of methods for matrix inversion (IMA J. Numer.
Anal. 12, 1992; method 2C, two products per block) an error e_b of the diagonal inverses becomes, in the largest entry,

    e_2b <= 2 b e_b + (b^2 + 2 b) gamma_b        gamma_b = b u / (1 - b u), u = 2^-24, e_1 = 0

to first order: `error_bound`. It holds for any keys, so nothing can blow up, but it is far from what happens: over random and correlated
keys, beta to 1 and decay to 1, the error is a few u, the same as forward substitution's (tests/test_portable_numerics.py measures both).

The product (I - A)(I + A^2)(I + A^4)... is the same matrix in exact arithmetic. Its factors are not bounded: at L = 64, correlation 0.5 and
beta 0.9 they cancel to errors larger than any entry of the result, so it is not used.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwen_export.plugins.emitter import Emitter, static_shape

UNIT_ROUNDOFF = 2.0**-24


def unit_lower_inverse(emit: Emitter, A: ir.Value, size: int) -> ir.Value:
    """(I + strictly lower part of A)^-1 for A f32[..., size, size]; entries of A on and above the diagonal are not read."""
    identity = emit.array(f"identity_{size}", np.eye(size, dtype=np.float32))
    X = identity
    for level, mask in enumerate(block_masks(size)):
        (block,) = emit("", "Mul", [A, emit.array(f"block_mask_{size}_{2**level}", mask)], like=A)
        if level == 0:
            (X,) = emit("", "Sub", [identity, block], like=A)
            continue
        (right,) = emit("", "MatMul", [block, X], like=A)
        (update,) = emit("", "MatMul", [X, right], like=A)
        (X,) = emit("", "Sub", [X, update], like=A)
    return X


def unit_lower_inverse_in_blocks(emit: Emitter, A: ir.Value, size: int, block: int) -> ir.Value:
    """The same for A f32[H,N,size,size], the first levels over diagonal blocks of `block` rows alone, the last ones over the blocks that
    they join: the same products without the zeros. Where `size` is not 2, 4, 8, ... blocks, all levels are written with masks.

    All blocks of a level are one batch. They are in the order of their numbers with the bits reversed, so that its first half are the
    upper blocks of the pairs to be joined, and its second half the lower ones."""
    count = size // block
    if size % block or count & (count - 1) or count < 2:
        return unit_lower_inverse(emit, A, size)
    H, N, *_ = static_shape(A)

    def parts(places: list[tuple[int, int]], b: int) -> ir.Value:
        pieces: list[ir.Value] = []
        for row, column in places:
            starts, stops = emit.ints(row * b, column * b), emit.ints((row + 1) * b, (column + 1) * b)
            pieces += emit("", "Slice", [A, starts, stops, emit.ints(2, 3)], like=A)
        stacked = pieces[0] if len(pieces) == 1 else emit.concat(pieces, axis=1)
        stacked.shape = ir.Shape((H, len(places) * N, b, b))
        return stacked

    X, b = unit_lower_inverse(emit, parts([(i, i) for i in _bits_reversed(count)], block), block), block
    while count > 1:
        count //= 2
        upper, lower = emit.split(X, [count * N, count * N], axis=1)
        off = parts([(2 * i + 1, 2 * i) for i in _bits_reversed(count)], b)
        (below,) = emit("", "Neg", [emit.matmul(lower, emit.matmul(off, upper))], like=A)
        zeros = emit.array(f"zeros_{H}_{count * N}_{b}", np.zeros((H, count * N, b, b), np.float32))
        X = emit.concat([emit.concat([upper, zeros], axis=3), emit.concat([below, lower], axis=3)], axis=2)
        b *= 2
    return X


def _bits_reversed(count: int) -> list[int]:
    """0, 1, ... count - 1, a power of 2, in the order of their reversed bits."""
    order = [0]
    while len(order) < count:
        order = [2 * i for i in order] + [2 * i + 1 for i in order]
    return order


def block_masks(size: int) -> list[npt.NDArray[np.float32]]:
    """M_1, M_2, M_4, ... of a size x size matrix; together they are the strictly lower triangle."""
    row, column = np.arange(size)[:, None], np.arange(size)[None]
    masks, b = [], 1
    while b < size:
        same = row // (2 * b) == column // (2 * b)
        masks.append((same & (row // b > column // b)).astype(np.float32))
        b *= 2
    return masks


def error_bound(size: int) -> float:
    """Largest possible error of an entry of the inverse, to first order, for A of the delta rule."""
    bound, b = 0.0, 1
    while b < size:
        gamma = b * UNIT_ROUNDOFF / (1 - b * UNIT_ROUNDOFF)
        bound = 2 * b * bound + (b * b + 2 * b) * gamma
        b *= 2
    return bound
