"""Where the rows of calibrated matrices are in a bundle, as a file of it says: so that `verify` can read back what their codes stand for.

A weight of a graph is an expression over stored matrices. It is evaluated over a source whose rows are their own numbers, which shows the
place of each row whatever the expression does with it.

    {"text": ..., "sha256": ..., "tokens": ..., "without_text": matrices of experts that too few tokens reached,
     "weights": [[graph, weight, rows, columns], ...],
     "rows": {stored matrix: [[number of the weight, first row in it, first row of the matrix, count], ...]}}

Rows of a stack of matrices are counted through.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwen_export.building.calibration.calibration_text import CalibrationText
from qwen_export.graphs.quantization.precision_plan import GPTQ
from qwen_export.graphs.quantization.quantized_weights import Quantized, QuantizedMatrices
from qwen_export.graphs.weights.expression import Weight
from qwen_export.graphs.weights.weight_writer import lazy_weights
from qwen_export.manifest import CALIBRATION


@dataclass(frozen=True)
class _RowNumbers:
    """A `TensorSource` whose rows are [number of the matrix, number of the row]."""

    shapes: Mapping[str, tuple[int, ...]]
    names: list[str]

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        inner = prod(self.shapes[name][1:-1])
        numbers = np.arange(start * inner, stop * inner, dtype=np.float32)
        pairs = np.stack([np.full_like(numbers, self.names.index(name)), numbers], axis=1)
        return pairs.reshape(stop - start, *self.shapes[name][1:-1], 2)


def row_places(models: Mapping[str, ir.Model], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """`weights` and `rows`, from graphs whose weights are not written yet; `shapes` of the calibrated matrices."""
    source = _RowNumbers(shapes, list(shapes))
    weights: list[list[Any]] = []
    rows: dict[str, list[list[int]]] = {}
    seen: set[Weight] = set()
    for graph, model in models.items():
        for value, weight in lazy_weights([model]):
            if not isinstance(weight, Quantized | QuantizedMatrices) or weight.method != GPTQ or weight in seen:
                continue
            seen.add(weight)
            found = weight.of.rows(source, 0, weight.of.shape[0]).reshape(-1, 2).astype(np.int64)
            for first, stop in _runs(found):
                matrix, row = (int(number) for number in found[first])
                rows.setdefault(source.names[matrix], []).append([len(weights), first, row, stop - first])
            weights.append([graph, value.name, *weight.of.shape[-2:]])
    return {"weights": weights, "rows": rows}


def _runs(found: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Where rows follow each other."""
    steps = np.diff(found, axis=0)
    cuts = np.flatnonzero((steps != (0, 1)).any(axis=1)) + 1
    ends = [0, *cuts.tolist(), len(found)]
    return list(pairwise(ends))


def write_places(staging: Path, text: CalibrationText, without_text: int, places: Mapping[str, Any]) -> None:
    facts = {"text": text.name, "sha256": text.digest, "tokens": int(text.windows.size), "without_text": without_text}
    (staging / CALIBRATION).write_text(json.dumps(facts | dict(places)) + "\n", encoding="utf-8")
