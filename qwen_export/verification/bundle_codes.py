"""The codes of calibrated matrices, read back from a bundle: no text is needed to know what a bundle should compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qwen_export.errors import BundleError
from qwen_export.graphs.checkpoint.formats.logical_tensor import GridRows
from qwen_export.graphs.quantization.packing import PANEL_ROWS, QuantFormat, unpack
from qwen_export.graphs.quantization.precision_plan import PrecisionPlan
from qwen_export.manifest import CALIBRATION, Manifest
from qwen_export.runtimes.memory.mapped_weights import MappedWeights


class BundleCodes:
    """`CalibratedCodes` of a bundle; `plan` has the formats. Raises BundleError where the file that has their places does not fit."""

    def __init__(self, bundle: Path, manifest: Manifest, plan: PrecisionPlan) -> None:
        path = bundle / CALIBRATION
        try:
            places = json.loads(path.read_text(encoding="utf-8"))
            self.key = str(places["sha256"])
            self._rows: dict[str, list[list[int]]] = places["rows"]
            specs = {(graph, spec.name): spec for graph, entry in manifest.graphs.items() for spec in entry.weights}
            self._weights = [(specs[graph, name], rows, columns) for graph, name, rows, columns in places["weights"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(
                "the places of calibrated weights cannot be read", where=str(path), got=repr(error)[:200], fix="Build the bundle again."
            ) from error
        self._mapped, self._plan = MappedWeights(bundle, manifest), plan

    def codes(self, name: str, start: int, stop: int) -> GridRows | None:
        if name not in self._rows:
            return None
        format = self._plan.of(name).quant
        if format is None:
            return None
        stacked = self._stack(name)
        first, last = start * stacked, stop * stacked
        parts = []
        for weight, at, row, count in sorted(self._rows[name], key=lambda run: run[2]):
            begin, end = max(first, row), min(last, row + count)
            if begin < end:
                parts += self._read(weight, at + begin - row, end - begin, format)
        codes, scales = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        zeros = np.concatenate([part[2] for part in parts]) if format.zeros else None
        if stacked > 1:
            codes, scales = (array.reshape(stop - start, stacked, -1) for array in (codes, scales))
            zeros = None if zeros is None else zeros.reshape(stop - start, stacked, -1)
        return GridRows(codes, scales.astype(np.float32), zeros, format.block, format.bits)

    def _stack(self, name: str) -> int:
        """Rows of one matrix of a stack, 1 for what is no stack."""
        return self._weights[self._rows[name][0][0]][1] if name.endswith((".experts.gate_up_proj", ".experts.down_proj")) else 1

    def _read(self, weight: int, first: int, count: int, format: QuantFormat) -> list[Any]:
        """Rows of a packed matrix, or of several that are packed one behind the other."""
        spec, rows, columns = self._weights[weight]
        panels = self._mapped.bytes(spec).reshape(-1, format.panel_bytes(columns))
        each, parts = -(-rows // PANEL_ROWS), []
        while count:
            matrix, row = divmod(first, rows)
            take = min(count, rows - row)
            low, high = row // PANEL_ROWS, -(-(row + take) // PANEL_ROWS)
            some = panels[matrix * each + low : matrix * each + high]
            codes, scales, zeros = unpack(format, some, min(rows, high * PANEL_ROWS) - low * PANEL_ROWS, columns)
            inside = slice(row - low * PANEL_ROWS, row - low * PANEL_ROWS + take)
            parts.append((codes[inside], scales[inside], None if zeros is None else zeros[inside]))
            first, count = first + take, count - take
        return parts
