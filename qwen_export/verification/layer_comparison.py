"""How far apart two sets of values are: polygraphy's comparator, which needs no TensorRT, on values that are scaled first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qwen_export.extras import needed_for

Floats = npt.NDArray[np.float32]


class Difference(NamedTuple):
    """`max_abs`: largest error, in units of the values. `share`: the root mean square of a token's error over that of the token's expected
    values, and the root mean square of these over the tokens: a token with large values does not hide the others."""

    max_abs: float
    share: float
    passed: bool


def compare(got: Mapping[str, Floats], expected: Mapping[str, Floats], tolerances: Mapping[str, float]) -> dict[str, Difference]:
    """Values [T,W] of the same names, all finite, T at least 1; `tolerances` are the largest `share` that passes."""
    comparator = comparators()
    from polygraphy.logger import G_LOGGER

    scaled: list[dict[str, Any]] = [{}, {}]
    for name, wanted in expected.items():
        unit = np.linalg.norm(wanted.astype(np.float64), axis=-1, keepdims=True) * np.sqrt(len(wanted))
        unit[unit == 0] = 1.0
        for values, into in zip((got[name], wanted), scaled, strict=True):
            into[name] = values / unit  # fp64
    norm = comparator.L2CompareFunc(l2_threshold=dict(tolerances))
    # Not by polygraphy's `compare_accuracy`, which makes quantiles of all values for its log first.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        shares = norm(
            *(comparator.IterationResult(values, runner_name=name) for name, values in zip(("bundle", "eager"), scaled, strict=True))
        )
    largest = {name: float(np.abs(got[name].astype(np.float64) - wanted).max()) for name, wanted in expected.items()}
    return {name: Difference(largest[name], shares[name].l2_norm, bool(shares[name])) for name in expected}


def comparators() -> Any:
    """polygraphy.comparator. Raises MissingExtra where it is not installed."""
    with needed_for("verify --per-layer"):
        from polygraphy import comparator
    return comparator
