"""A weight in a GGUF file, with what llama.cpp's converter did to it undone.

Blocks of 32 or 256 values of a row are dequantized by the `gguf` package, a few rows at a time. Q8_0 and Q4_0 are integers with one fp16
scale per 32 values, w = d * q and w = d * (q - 8), which kernels can keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from qwen_export.element_types import BY_SAFETENSORS
from qwen_export.errors import CheckpointError, UnsupportedError
from qwen_export.extras import needed_for
from qwen_export.graphs.checkpoint.formats.logical_tensor import Floats, Grid, GridRows, LogicalTensor, Parts
from qwen_export.graphs.checkpoint.formats.plain_tensor import PlainTensor, widened
from qwen_export.graphs.checkpoint.formats.storage_format import OTHER_RELEASE
from qwen_export.graphs.checkpoint.llama_cpp.gguf_header import FLOATS, GgufTensor
from qwen_export.graphs.checkpoint.llama_cpp.head_orders import Order, ValueHeads, runs
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo

ONE_ADDED, DECAY = "1 + w", "-exp(w)"
"""Folds of the converter: into norms whose weights are centered at zero, and into A_log."""

_GROUP = 32
_GRIDS = {"Q8_0": 8, "Q4_0": 4}


@dataclass(frozen=True)
class FoldedTensor(LogicalTensor):
    """`info` has the stored rows. `rows_in` and `columns_in` are their orders in the file, None for the same; `fold` is undone."""

    kind: str
    info: TensorInfo
    rows_in: Order | None = None
    columns_in: ValueHeads | None = None
    fold: str = ""

    @property
    def dtype(self) -> str:
        return FLOATS[self.kind] if self.kind in FLOATS and not self.fold else "F32"

    @property
    def storage(self) -> str:
        return BY_SAFETENSORS[FLOATS[self.kind]].short if self.kind in FLOATS else self.kind.lower()

    @property
    def recipe(self) -> str:
        return f"{self.kind} {self.rows_in!r} {self.columns_in!r} {self.fold}"

    @property
    def quantized(self) -> bool:
        return self.kind not in FLOATS

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.info,)

    @property
    def grid(self) -> Grid | None:
        if self.kind not in _GRIDS or len(self.shape) != 2 or (self.columns_in is not None and self.columns_in.size % _GROUP):
            return None
        return Grid(_GRIDS[self.kind], _GROUP, True, "F16")

    def codes(self, parts: Parts, start: int, stop: int) -> GridRows | None:
        if self.grid is None:
            return None
        bits, blocks = _GRIDS[self.kind], self.shape[1] // _GROUP
        raw = self._stored(parts, start, stop).reshape(stop - start, blocks, 2 + _GROUP * bits // 8)
        scales, packed = np.ascontiguousarray(raw[:, :, :2]).view(np.float16)[:, :, 0].astype(np.float32), raw[:, :, 2:]
        if not np.isfinite(scales).all():
            raise CheckpointError(
                "a quantized weight has scales that are not finite", where=self.name, fix="The file is damaged: copy or download it again."
            )
        # Q4_0 has values 0 to 15 of a block in the low halves of its bytes, 16 to 31 in the high ones.
        codes = packed ^ np.uint8(128) if bits == 8 else np.concatenate([packed & 15, packed >> 4], axis=2)
        if self.columns_in is not None:
            first = self.columns_in.stored(np.arange(0, self.shape[1], _GROUP)) // _GROUP
            codes, scales = codes[:, first], np.ascontiguousarray(scales[:, first])
        return GridRows(np.ascontiguousarray(codes).reshape(stop - start, -1), scales, None, _GROUP, bits)

    def rows(self, parts: Parts, start: int, stop: int) -> Floats:
        stored = self._stored(parts, start, stop)
        values = widened(stored, self.info.dtype) if self.kind in FLOATS else dequantized(stored, self.kind, self.name)
        if self.columns_in is not None:
            values = values[:, self.columns_in.stored(np.arange(self.shape[1]))]
        if self.fold == ONE_ADDED:
            values = values - np.float32(1)
        elif self.fold == DECAY:
            if not (values < 0).all():
                raise CheckpointError(
                    "the decay of a DeltaNet layer is not negative",
                    where=f"{self.info.file}, tensor {self.info.name}",
                    got=f"{values.max():g}",
                    expected="-exp(A_log), as llama.cpp stores it",
                    fix="Convert the model again with llama.cpp.",
                )
            values = np.log(-values)
        return values.reshape(stop - start, *self.shape[1:])

    def _stored(self, parts: Parts, start: int, stop: int) -> np.ndarray:
        """The stored rows of these rows, in their order."""
        if self.rows_in is None:
            return parts.stored(self.info, start, stop)
        ranges = runs(self.rows_in.stored(np.arange(start, stop)))
        return np.concatenate([parts.stored(self.info, first, last) for first, last in ranges])


def folded(
    name: str,
    stored: GgufTensor,
    shape: tuple[int, ...],
    rows_in: Order | None = None,
    columns_in: ValueHeads | None = None,
    fold: str = "",
) -> LogicalTensor:
    """The weight `name` of one stored tensor. Its rows may have another shape there: axes of length 1 are not stored."""
    if columns_in is not None and columns_in.ratio == 1:
        columns_in = None
    if isinstance(rows_in, ValueHeads) and rows_in.ratio == 1:
        rows_in = None
    info = stored.info
    if len(shape) != len(stored.shape) and len(shape) == 2 and shape[0] == 1:  # one row, stored as a vector
        info = TensorInfo(info.name, info.file, info.dtype, (1, *info.shape), info.offset)
    if stored.kind in FLOATS and rows_in is None and columns_in is None and not fold and info.shape == shape:
        return PlainTensor(name, shape, info)
    if not is_readable(stored.kind):
        raise UnsupportedError(
            "this quantization of GGUF files is not supported",
            where=f"{info.file}, tensor {info.name}",
            got=stored.kind,
            expected="types that the `gguf` package dequantizes: Q8_0, Q4_0, K quants and others",
            fix=OTHER_RELEASE,
        )
    return FoldedTensor(name, shape, stored.kind, info, rows_in, columns_in, fold)


@cache
def is_readable(kind: str) -> bool:
    """Whether values of this type can be read."""
    if kind in FLOATS:
        return True
    try:
        dequantized(np.zeros((1, _block_bytes(kind)), np.uint8), kind, kind)
    except NotImplementedError:
        return False
    return True


def dequantized(raw: np.ndarray, kind: str, name: str) -> Floats:
    """Rows of bytes as fp32."""
    with needed_for("a GGUF file"):
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize
    with np.errstate(all="ignore"):  # the reader reports values that are not finite
        return np.asarray(dequantize(raw.reshape(-1, raw.shape[-1]), GGMLQuantizationType[kind]), np.float32)


def _block_bytes(kind: str) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
