"""Quantized products of the CPU plugin against numpy. A process has one instruction set, so this is also a script:

QWEN_EXPORT_CPU_SET=base python -m tests.support.quant_ops LIBRARY
"""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper

from qwen_export.graphs.quantization.packing import QuantFormat, dequantize, pack
from tests.support.plugin_session import plugin_session

Array = npt.NDArray[Any]

EPSILON = 1e-6
# Every remainder of a tile, and more than one tile; from 32 on in tile registers, where the set has them, the last one full or not.
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 32, 33, 43)
SHAPES = ((37, 100), (48, 416))
FORMATS = tuple(QuantFormat(*given) for given in product((4, 8), (32, 64, 128), (False, True), (False, True)))
# An activation that lies between two codes may go to either: fp32 here, float64 in the reference.
TOLERANCE = 1e-2
_ELEMENTS = {"ids": TensorProto.INT64, "w": TensorProto.UINT8}


def session(library: str, op: str, format: QuantFormat, N: int, K: int, inputs: tuple[str, ...], threads: int = 1) -> ort.InferenceSession:
    """One node on a matrix [N,K]; `inputs` by position, "" for one that is left out."""
    attributes: dict[str, Any] = format.attributes(N, K) | ({} if op == "QuantGather" else {"epsilon": EPSILON})
    node = helper.make_node(op, inputs, ["y"], domain="qwen.native", **attributes)
    given = [helper.make_tensor_value_info(name, _ELEMENTS.get(name, TensorProto.FLOAT), None) for name in inputs if name]
    return plugin_session(library, node, given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], threads)


def run(made: ort.InferenceSession, **tensors: Array) -> Array:
    return np.asarray(made.run(None, tensors)[0])


def random_codes(format: QuantFormat, N: int, K: int) -> tuple[Array, Array, Array | None]:
    """Arbitrary codes [N,K], scales of both signs and zeros [N,blocks]."""
    rng = np.random.default_rng(N * 10000 + K)
    blocks, top = format.blocks(K), 1 << format.bits
    codes = rng.integers(0, top, (N, K)).astype(np.uint8)
    scales = (rng.normal(size=(N, blocks)) / K**0.5 / top).astype(format.scale_dtype)
    return codes, scales, rng.integers(0, top, (N, blocks)).astype(np.uint8) if format.zeros else None


def random_matrix(format: QuantFormat, N: int, K: int) -> tuple[Array, Array]:
    """A packed matrix of arbitrary codes, and what it stands for."""
    codes, scales, zeros = random_codes(format, N, K)
    return pack(format, codes, scales, zeros), dequantize(format, codes, scales, zeros)


def rounded(x: Array, block: int) -> Array:
    """x in float64 as the kernels see it: per row and block of values, multiples of the largest magnitude / 127."""
    M, K = x.shape
    blocks = np.zeros((M, -(-K // block) * block))
    blocks[:, :K] = x
    blocks = blocks.reshape(M, -1, block)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / 127
    codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return np.asarray((codes * scale).reshape(M, -1)[:, :K])


def blocks_of(values: Array, block: int) -> Array:
    """[rows, K] as [rows, blocks, block], zeros behind K."""
    rows, K = values.shape
    padded = np.zeros((rows, -(-K // block) * block), values.dtype)
    padded[:, :K] = values
    return padded.reshape(rows, -1, block)


def exact_bits(format: QuantFormat, x: Array, w: tuple[Array, Array, Array | None]) -> list[Array]:
    """The product by quant.h: sums of blocks as integers, blocks one after the other in fp32, with fused multiply-adds and without."""
    codes, scales, zeros = w
    values = blocks_of(x, format.block)
    most = np.abs(values).max(axis=2)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    a, a_scales = np.rint(values * inverse[..., None]).astype(np.int64), most / np.float32(127)
    zero = np.full(scales.shape, 1 << (format.bits - 1)) if zeros is None else zeros.astype(np.int64)
    b = blocks_of(codes.astype(np.int64), format.block) - zero[..., None]
    sums = np.einsum("mbk,nbk->bmn", a, b).astype(np.float32)
    fused = unfused = np.zeros(sums.shape[1:], np.float32)
    for i, block in enumerate(sums):
        scale = scales[:, i].astype(np.float32) * a_scales[:, i, None]
        fused = (block.astype(np.longdouble) * scale + fused).astype(np.float32)
        unfused = block * scale + unfused
    return [fused, unfused]


def expected(op: str, format: QuantFormat, x: Array, w: Array, residual: Array | None = None, norm: Array | None = None) -> Array:
    """The op in float64, over activations that are rounded as the kernels round them."""
    wide = x.astype(np.float64)
    if norm is not None:
        wide = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPSILON) * norm
    h = rounded(wide, format.block) @ w.T.astype(np.float64)
    if op == "QuantSwiGlu":
        gate, up = np.split(h, 2, axis=1)
        return np.asarray(gate / (1 + np.exp(-gate)) * up)
    return np.asarray(h if residual is None else h + residual)


def error(got: Array, wanted: Array) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def check_products(library: str) -> None:
    """Every format, shape and number of rows, with and without norm and residual; and equal rows give equal bits."""
    for format, (N, K) in product(FORMATS, SHAPES):
        packed, w = random_matrix(format, N, K)
        rng = np.random.default_rng(1)
        x, residual = (rng.normal(size=(ROWS[-1], width)).astype(np.float32) for width in (K, N))
        norm = (1 + rng.normal(size=K) / 4).astype(np.float32)
        plain = session(library, "QuantLinear", format, N, K, ("x", "w"))
        both = session(library, "QuantLinear", format, N, K, ("x", "w", "residual", "norm"))
        whole, added = run(plain, x=x, w=packed), run(both, x=x, w=packed, residual=residual, norm=norm)
        assert error(whole, expected("QuantLinear", format, x, w)) < TOLERANCE, (format, N, K)
        assert error(added, expected("QuantLinear", format, x, w, residual, norm)) < TOLERANCE, (format, N, K)
        for M in ROWS:
            assert np.array_equal(run(plain, x=x[:M], w=packed), whole[:M]), ("bits differ", format, N, K, M)
            got = run(both, x=x[:M], w=packed, residual=residual[:M], norm=norm)
            assert np.array_equal(got, added[:M]), ("bits differ", format, N, K, M)
        ids = np.array([[0, N - 1], [N // 2, 0]])
        assert np.array_equal(run(session(library, "QuantGather", format, N, K, ("ids", "w")), ids=ids, w=packed), w[ids]), (format, N, K)


def check_swiglu(library: str) -> None:
    """Gate rows, then up rows, in one matrix."""
    for format, (N, K) in product(FORMATS, ((16, 96), (96, 256))):
        packed, w = random_matrix(format, 2 * N, K)
        x = np.random.default_rng(2).normal(size=(ROWS[-1], K)).astype(np.float32) * 3
        norm = np.linspace(0.5, 1.5, K, dtype=np.float32)
        made = session(library, "QuantSwiGlu", format, 2 * N, K, ("x", "w", "norm"))
        whole = run(made, x=x, w=packed, norm=norm)
        assert error(whole, expected("QuantSwiGlu", format, x, w, norm=norm)) < TOLERANCE, (format, N, K)
        for M in ROWS:
            assert np.array_equal(run(made, x=x[:M], w=packed, norm=norm), whole[:M]), ("bits differ", format, N, K, M)


def check_bits(library: str) -> None:
    """Every instruction set gives the bits of plain integers, few rows and many: sets differ in fused multiply-adds only."""
    for format, (N, K) in product(FORMATS, SHAPES):
        w = random_codes(format, N, K)
        x = np.random.default_rng(4).normal(size=(ROWS[-1], K)).astype(np.float32)
        x[1] = 0
        made, packed = session(library, "QuantLinear", format, N, K, ("x", "w")), pack(format, *w)
        wanted = exact_bits(format, x, w)
        for M in (1, ROWS[-1]):
            assert any(np.array_equal(run(made, x=x[:M], w=packed), bits[:M]) for bits in wanted), ("bits differ", format, N, K, M)


def check_prefix(library: str) -> None:
    """The first rows of a packed matrix are a packed matrix: a draft head reads part of the head."""
    for format in FORMATS:
        packed, _ = random_matrix(format, 64, 200)
        x = np.random.default_rng(3).normal(size=(5, 200)).astype(np.float32)
        whole = run(session(library, "QuantLinear", format, 64, 200, ("x", "w")), x=x, w=packed)
        for N in (16, 32, 48):
            made = session(library, "QuantLinear", format, N, 200, ("x", "w"))
            assert np.array_equal(run(made, x=x, w=packed), whole[:, :N]), (format, N)
            assert np.array_equal(run(made, x=x, w=packed[: N // 16]), whole[:, :N]), (format, N)


if __name__ == "__main__":
    check_products(sys.argv[1])
    check_swiglu(sys.argv[1])
    check_bits(sys.argv[1])
    check_prefix(sys.argv[1])
