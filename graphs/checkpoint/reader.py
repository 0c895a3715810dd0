"""Reading weights: a few rows at a time, checked as they pass.

Rows are read into a fresh array and dropped after use, so a build's memory does not grow with the checkpoint, as it would with mapped
files.
"""

from __future__ import annotations

from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.directory import Checkpoint
from qwen_export.graphs.checkpoint.names import stored_name
from qwen_export.graphs.checkpoint.safetensors_header import ITEM_SIZE, TensorInfo

_BITS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
# Unused vocabulary rows are legitimately zero; any other all-zero output row is a damaged projection.
_MAY_HAVE_ZERO_ROWS = ("embed_tokens.weight", "lm_head.weight")


class CheckpointReader:
    """A `TensorSource` over a checkpoint, in the names of the modules."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[Path, FileIO] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start..stop-1 of the parameter `name`, as fp32. Raises CheckpointError for values that no model can use."""
        info = self._checkpoint.tensors[stored_name(self._checkpoint.config, name)]
        raw = self._read(info, start, stop)
        # One pass finds both defects: the largest magnitude of a row is not finite, or zero.
        if info.dtype == "BF16":
            largest = (raw & 0x7FFF).reshape(len(raw), -1).max(axis=1)
            finite, zero = largest < 0x7F80, largest == 0
            values = np.left_shift(raw, 16, dtype=np.uint32).view(np.float32)
        else:
            values = raw.astype(np.float32, copy=False)
            magnitude = np.abs(values).reshape(len(raw), -1).max(axis=1)
            finite, zero = np.isfinite(magnitude), magnitude == 0
        if not finite.all():
            raise CheckpointError("a weight has values that are not finite", where=info.name, fix="The checkpoint is damaged.")
        if zero.any() and len(info.shape) == 2 and not name.endswith(_MAY_HAVE_ZERO_ROWS):
            raise CheckpointError(
                "a projection has rows that are all zero",
                where=info.name,
                got=f"{int(zero.sum())} of rows {start}..{stop - 1}, first {start + int(zero.argmax())}",
                fix="The checkpoint is damaged: a converter dropped part of it.",
            )
        return values

    def _read(self, info: TensorInfo, start: int, stop: int) -> npt.NDArray[Any]:
        row = prod(info.shape[1:]) * ITEM_SIZE[info.dtype]
        buffer = np.empty((stop - start, *info.shape[1:]), _BITS[info.dtype])
        try:
            complete = self._fill(buffer, info.file, info.offset + start * row)
        except OSError as error:
            raise CheckpointError("a weight file cannot be read", where=f"{info.file}, tensor {info.name}", got=error.strerror) from error
        if not complete:
            raise CheckpointError("the weight file ends inside a tensor", where=f"{info.file}, tensor {info.name}")
        return buffer

    def _fill(self, buffer: npt.NDArray[Any], path: Path, offset: int) -> bool:
        """Read the bytes at `offset` into `buffer`; False when the file ends before that."""
        if path not in self._files:
            self._files[path] = path.open("rb", buffering=0)
        file, view, done = self._files[path], buffer.reshape(-1).view(np.uint8).data, 0
        file.seek(offset)
        while done < buffer.nbytes:
            got = file.readinto(view[done:])
            if not got:
                return False
            done += got
        return True
