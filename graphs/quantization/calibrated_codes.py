"""Codes that a calibration found, by the stored matrix that they are of: kept in a file until the bundle is written, or read from a bundle.

A `CalibratedSource` gives them out in place of the checkpoint's weights, as `rows` and as `codes`; whatever evaluates weight expressions
then needs to know nothing of calibration.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen_export.errors import BuildError
from qwen_export.graphs.checkpoint.formats.logical_tensor import Fp8Rows, GridRows
from qwen_export.graphs.quantization.packing import Array, Bytes, Floats, QuantFormat, dequantize
from qwen_export.graphs.weights.expression import TensorSource


class CalibratedCodes(Protocol):
    """Who has codes."""

    @property
    def key(self) -> str:
        """A text that changes with the codes."""

    def codes(self, name: str, start: int, stop: int) -> GridRows | None:
        """Rows start..stop-1 of a stored matrix, or matrices of a stored stack; None for one that was not calibrated."""


class IdentifiedSource(TensorSource, Protocol):
    """What `CheckpointReader` is."""

    def codes(self, name: str, start: int, stop: int) -> GridRows | None: ...

    def fp8(self, name: str, start: int, stop: int) -> Fp8Rows | None: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def identity(self, name: str) -> str: ...


@dataclass(frozen=True)
class CalibratedSource:
    """A checkpoint, with the codes of a calibration instead of what it stores."""

    checkpoint: IdentifiedSource
    calibrated: CalibratedCodes

    def rows(self, name: str, start: int, stop: int) -> Floats:
        found = self.calibrated.codes(name, start, stop)
        return self.checkpoint.rows(name, start, stop) if found is None else grid_values(found)

    def codes(self, name: str, start: int, stop: int) -> GridRows | None:
        found = self.calibrated.codes(name, start, stop)
        return self.checkpoint.codes(name, start, stop) if found is None else found

    def fp8(self, name: str, start: int, stop: int) -> Fp8Rows | None:
        return self.checkpoint.fp8(name, start, stop)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(name)

    def identity(self, name: str) -> str:
        return f"{self.checkpoint.identity(name)} {self.calibrated.key}"


def with_codes(checkpoint: IdentifiedSource, codes: CalibratedCodes | None) -> IdentifiedSource:
    """The checkpoint as it is where there are no codes."""
    return checkpoint if codes is None else CalibratedSource(checkpoint, codes)


def grid_values(rows: GridRows) -> Floats:
    """The values that codes [...,K] stand for."""
    K, flat = rows.codes.shape[-1], rows.codes.reshape(-1, rows.codes.shape[-1])
    zeros = None if rows.zeros is None else rows.zeros.reshape(len(flat), -1)
    format = QuantFormat(rows.bits, rows.group, zeros is not None)
    return dequantize(format, flat, rows.scales.reshape(len(flat), -1), zeros).reshape(*rows.codes.shape[:-1], K)


@dataclass(frozen=True)
class Entry:
    """Where the codes of one matrix are in the file, of a stack with its `index` there, else -1."""

    name: str
    index: int
    offset: int
    N: int
    K: int
    bits: int
    block: int
    zeros: bool
    searched: bool
    """Whether they were found from the weights alone."""

    @property
    def format(self) -> QuantFormat:
        return QuantFormat(self.bits, self.block, self.zeros)


class CodeFile:
    """A file of codes, scales and zeros, matrix after matrix. It may be read from several threads while nothing is added."""

    def __init__(self, path: Path, key: str) -> None:
        self.key = key
        path.touch(mode=0o600)
        self._path = path
        self._file, self._lock = path.open("r+b", buffering=0), threading.Lock()
        self._entries: dict[tuple[str, int], Entry] = {}
        self._stacks: set[str] = set()
        self.end = 0

    def close(self) -> None:
        self._file.close()

    def restore(self, entries: Iterable[dict[str, Any]], end: int) -> None:
        """Take over what an interrupted run has left up to byte `end`."""
        for values in entries:
            self._know(Entry(**values))
        self.end = end
        self._file.truncate(end)

    @property
    def searched(self) -> int:
        """How many matrices have codes that were found from the weights alone."""
        return sum(entry.searched for entry in self._entries.values())

    def add(self, name: str, index: int, format: QuantFormat, grid: tuple[Bytes, Array, Bytes | None], *, searched: bool) -> dict[str, Any]:
        """Keep codes, scales and zeros of a matrix; returns its entry for a journal."""
        codes, scales, zeros = grid
        N, K = codes.shape
        entry = Entry(name, index, self.end, N, K, format.bits, format.block, format.zeros, searched)
        flat = codes.reshape(-1)
        if format.bits == 4:
            flat = np.append(flat, np.uint8(0)) if len(flat) % 2 else flat
            flat = flat[::2] | np.left_shift(flat[1::2], 4)
        parts = [flat, scales.reshape(-1), *([zeros.reshape(-1)] if zeros is not None else [])]
        for part in parts:
            data = np.ascontiguousarray(part).view(np.uint8)
            with self._lock:
                self._file.seek(self.end)
                self._file.write(data.data)
            self.end += data.nbytes
        self._know(entry)
        return asdict(entry)

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def codes(self, name: str, start: int, stop: int) -> GridRows | None:
        if name in self._stacks:
            found = [self._entries.get((name, index)) for index in range(start, stop)]
            if None in found:
                return None
            return _stacked([self._rows(entry, 0, entry.N) for entry in found if entry is not None])
        entry = self._entries.get((name, -1))
        return None if entry is None else self._rows(entry, start, stop)

    def _know(self, entry: Entry) -> None:
        self._entries[entry.name, entry.index] = entry
        if entry.index >= 0:
            self._stacks.add(entry.name)

    def _rows(self, entry: Entry, start: int, stop: int) -> GridRows:
        N, K, blocks, take = entry.N, entry.K, entry.format.blocks(entry.K), stop - start
        if entry.bits == 4:
            first, last = start * K // 2, -(-stop * K // 2)
            pairs = self._read(entry.offset + first, last - first)
            codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[start * K - 2 * first :][: take * K].reshape(take, K)
        else:
            codes = self._read(entry.offset + start * K, take * K).reshape(take, K)
        at = entry.offset + (-(-N * K // 2) if entry.bits == 4 else N * K)
        scales = self._read(at + 2 * start * blocks, 2 * take * blocks).view(np.float16).reshape(take, blocks)
        at += 2 * N * blocks
        zeros = self._read(at + start * blocks, take * blocks).reshape(take, blocks) if entry.zeros else None
        return GridRows(codes, scales.astype(np.float32), zeros, entry.block, entry.bits)

    def _read(self, offset: int, count: int) -> Bytes:
        data = np.empty(count, np.uint8)
        with self._lock:
            self._file.seek(offset)
            if self._file.readinto(data.data) != count:
                raise BuildError(
                    "the file of calibrated codes ends early",
                    where=str(self._path),
                    fix="Is the disk full? Remove the directory that holds it, and build again.",
                )
        return data


def _stacked(parts: list[GridRows]) -> GridRows:
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return GridRows(
        np.stack([part.codes for part in parts]),
        np.stack([part.scales for part in parts]),
        np.stack(zeros) if zeros else None,
        parts[0].group,
        parts[0].bits,
    )
