"""How far apart two sets of values are: polygraphy's comparators, which need no TensorRT, on values that are scaled first."""

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
    scaled: list[dict[str, Floats]] = [{}, {}]
    for name, wanted in expected.items():
        unit = np.linalg.norm(wanted.astype(np.float64), axis=-1, keepdims=True) * np.sqrt(len(wanted))
        unit[unit == 0] = 1.0
        for values, into in zip((got[name], wanted), scaled, strict=True):
            into[name] = values / unit  # fp64
    # Its verdicts are of tolerances in the units of the values; only the largest difference is wanted.
    simple = comparator.SimpleCompareFunc(atol=np.inf, rtol=0.0, check_error_stat="max")
    norm = comparator.L2CompareFunc(l2_threshold=dict(tolerances))
    plain = _run(comparator, got, expected, simple)
    shares = _run(comparator, scaled[0], scaled[1], norm)
    return {name: Difference(plain[name].max_absdiff, shares[name].l2_norm, bool(shares[name])) for name in expected}


def _run(comparator: Any, got: Mapping[str, Floats], expected: Mapping[str, Floats], function: Any) -> Mapping[str, Any]:
    from polygraphy.logger import G_LOGGER

    results = comparator.RunResults()
    for runner, values in (("bundle", got), ("eager", expected)):
        results.append((runner, [comparator.IterationResult(dict(values), runner_name=runner)]))
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        accuracy = comparator.Comparator.compare_accuracy(results, compare_func=function)
    (_, (matched,)), *_ = (item for result in accuracy for item in result.items())
    return dict(matched)


def comparators() -> Any:
    """polygraphy.comparator. Raises MissingExtra where it is not installed."""
    with needed_for("verify --per-layer"):
        from polygraphy import comparator
    return comparator
