"""The families of CPU kernels that a bundle can run on, and how far a result may depend on the shape of the call that made it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from qwen_export.manifest import Manifest
from qwen_export.plugins.native.native_library import find_library

FAMILIES = ("plugin", "builtin", "onnx")

TOLERANCE = {
    # A row has the same bits alone, in a batch and in a prompt: sums are taken in one order.
    "plugin": 0.0,
    # The others choose the order of a sum by the shape of the call, and by the processor. Seen: 6.1e-5 where it has AMX.
    "builtin": 1e-4,
    "onnx": 1e-4,
}
"""Largest difference of a logit, absolute, and of an entry of a state, as a share of it, between two ways to read the same tokens."""


needs_plugin = pytest.mark.skipif(find_library("cpu") is None, reason="the CPU kernels are not compiled, or switched off")


def lengths(session: ort.InferenceSession, before: Sequence[int], T: int) -> dict[str, np.ndarray]:
    """The inputs of a graph that tell its attention kernel how many tokens each sequence has before a call of T."""
    if "length" in {value.name for value in session.get_inputs()}:
        return {"length": np.array(before, np.int64)}
    last = np.array(before, np.int32) + T - 1
    return {"last_slot": last.astype(np.int32), "total_length": np.array(last.max() + 1, np.int32)}


def family_of(manifest: Manifest) -> str:
    if manifest.target.name != "onnxruntime":
        return "onnx"
    return "plugin" if manifest.plugins else "builtin"


def family_cases() -> list[Any]:
    """The families, as cases of a test. `make test-builtin` runs without the plugin."""
    return [pytest.param(name, marks=needs_plugin) if name == "plugin" else name for name in FAMILIES]
