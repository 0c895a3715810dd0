"""Reading weights: a few rows at a time, each checked when it is read.

Rows are read into fresh arrays and dropped after use, so a build's memory does not grow with the checkpoint, as it would with mapped files.
All methods may be called from several threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.file_access import SharedFile
from qwen_export.graphs.checkpoint.formats.logical_tensor import Fp8Rows, Grid, GridRows, LogicalTensor, numpy_type
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo
from qwen_export.graphs.checkpoint.tensor_names import stored_name
from qwen_export.graphs.e4m3 import has_nan
from qwen_export.graphs.json_file import AGAIN

_KEPT_BYTES = 64 << 20


class CheckpointReader:
    """A `TensorSource` over a checkpoint, in the names of the modules. Quantized weights are dequantized."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[Path, SharedFile] = {}
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Path, int], npt.NDArray[Any]] = OrderedDict()
        self._kept_lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._kept.clear()

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start..stop-1 of the parameter `name`, as fp32. Raises CheckpointError for values that are not finite.

        Rows of zeros are read as any others: models have them (unused vocabulary rows, layers that block expansion added)."""
        weight = self._weight(name)
        values = weight.rows(self, start, stop)
        flat = values.reshape(len(values), -1)
        if flat.size and not (np.isfinite(flat.max(axis=1)) & np.isfinite(flat.min(axis=1))).all():
            raise _not_finite(weight)
        return values

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self._weight(name).shape

    def grid(self, name: str) -> Grid | None:
        """The integer grid that the parameter is stored on; None for one that is not."""
        return self._weight(name).grid

    def codes(self, name: str, start: int, stop: int) -> GridRows | None:
        """The same rows as `rows` on that grid, with the bits that the checkpoint stores."""
        return self._weight(name).codes(self, start, stop)

    def fp8(self, name: str, start: int, stop: int) -> Fp8Rows | None:
        """The same rows as the FP8 codes that the checkpoint stores, bit for bit, with their scales; None where it stores none. Raises
        CheckpointError for codes that are no numbers."""
        weight = self._weight(name)
        rows = weight.fp8_rows(self, start, stop)
        if rows is not None and has_nan(rows.codes):
            raise _not_finite(weight)
        return rows

    def identity(self, name: str) -> str:
        """A text that changes with the contents of a stored weight, made from its parts, with size and time of their files."""
        parts = []
        for info in self._weight(name).parts:
            stat = info.file.stat()
            parts.append(f"{info.file.absolute()} {stat.st_size} {stat.st_mtime_ns} {info.offset} {info.dtype} {info.shape}")
        return "; ".join([self._weight(name).recipe, *parts])

    def stored(self, info: TensorInfo, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows start..stop-1 of a stored tensor, in the numpy type of its elements."""
        dtype = numpy_type(info)
        row = prod(info.shape[1:]) * dtype.itemsize
        buffer = np.empty((stop - start, *info.shape[1:]), dtype)
        self._read(buffer, info, info.offset + start * row)
        return buffer

    def whole(self, info: TensorInfo) -> npt.NDArray[Any]:
        """A whole stored tensor: scales, and codes that are packed across rows. The latest few are kept."""
        place = (info.file, info.offset)  # names of tensors are those of one file
        with self._kept_lock:
            kept = self._kept.pop(place, None)
            if kept is None:
                kept = np.empty(info.shape, numpy_type(info))
                self._read(kept, info, info.offset)
                while self._kept and kept.nbytes + sum(array.nbytes for array in self._kept.values()) > _KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept[place] = kept
        return kept

    def _weight(self, name: str) -> LogicalTensor:
        return self._checkpoint.weights[stored_name(self._checkpoint.config, name)]

    def _read(self, buffer: npt.NDArray[Any], info: TensorInfo, offset: int) -> None:
        try:
            complete = self._fill(buffer, info.file, offset)
        except OSError as error:
            raise CheckpointError(
                "a weight file cannot be read", where=f"{info.file}, tensor {info.name}", got=error.strerror, fix=AGAIN
            ) from error
        if not complete:
            raise CheckpointError("the weight file ends inside a tensor", where=f"{info.file}, tensor {info.name}", fix=AGAIN)

    def _fill(self, buffer: npt.NDArray[Any], path: Path, offset: int) -> bool:
        """Read the bytes at `offset` into `buffer`; False when the file ends before that."""
        with self._lock:
            if path not in self._files:
                self._files[path] = SharedFile(path)
            file = self._files[path]
        return file.read_into(buffer.reshape(-1).view(np.uint8).data, offset)


def _not_finite(weight: LogicalTensor) -> CheckpointError:
    return CheckpointError(
        "a weight has values that are not finite",
        where=weight.name,
        fix="The checkpoint is damaged, or was trained to NaN. Copy or download it again.",
    )
