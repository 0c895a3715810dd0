"""One trace for all builds of one architecture in a run of the tests.

What `qwen_export.graphs.capture` returns depends on its arguments only, and no weight is read. Traces take most of the time of a build of
a tiny checkpoint, and most builds of the tests differ in what comes after: weights, passes, targets. The first build that needs a trace
makes it and leaves it in a folder, which all workers read, and later runs while nothing changes that a trace depends on. Tests of the
tracing itself call `graphs.capture`, which is left alone.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qwen_export.building import lower_graphs
from qwen_export.graphs.weights.expression import WeightTensor
from tests.support.source_tree import ROOT, sources

_SHARED = ("capture_decoder", "capture_mtp", "capture_vision")
_STAND_IN = np.zeros(1, np.float32)
_TRACERS = ("torch", "onnx", "onnx-ir", "onnxscript")


_A_DAY = 24 * 3600


def share_captures(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Builds of this process take their traces from `folder`, and leave there those that are missing."""
    current = folder / _digest()
    current.mkdir(exist_ok=True)
    os.utime(current)
    for other in folder.iterdir():  # of other sources; a run beside this one may read them
        if other.stat().st_mtime < current.stat().st_mtime - _A_DAY:
            shutil.rmtree(other, ignore_errors=True)
    for name in _SHARED:
        patch.setattr(lower_graphs, name, _shared(getattr(lower_graphs, name), current))


def _digest() -> str:
    """What traces depend on: the packages that make them and the sources of `graphs`, which imports itself and the ground modules only."""
    paths = [*sources("graphs"), *sorted((ROOT / "qwen_export").glob("*.py")), Path(__file__)]
    texts = [*(version(name) for name in _TRACERS), *(path.read_text(encoding="utf-8") for path in paths)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _shared(capture: Callable[..., ir.Model], folder: Path) -> Callable[..., ir.Model]:
    loaded: dict[str, ir.Model] = {}

    def shared(*arguments: object, **options: object) -> ir.Model:
        # The arguments are frozen dataclasses, texts and numbers: their repr has every field.
        key = f"{capture.__name__}{arguments}{sorted(options.items())}"
        path = folder / hashlib.sha256(key.encode()).hexdigest()
        if key not in loaded:
            if not path.exists():
                _write(capture(*arguments, **options), path)
            loaded[key] = _read(path)
        return loaded[key].clone()

    return shared


def _write(model: ir.Model, path: Path) -> None:
    """The graph as a model of ONNX, and its lazy weights by name."""
    weights = {}
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, WeightTensor):
            weights[name] = value.const_value.weight
            value.const_value = ir.tensor(_STAND_IN, name=name)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_bytes(pickle.dumps((ir.to_proto(model).SerializeToString(), weights)))
    unfinished.replace(path)


def _read(path: Path) -> ir.Model:
    import onnx

    proto, weights = pickle.loads(path.read_bytes())
    model = ir.from_proto(onnx.ModelProto.FromString(proto))
    for name, weight in weights.items():
        value, tensor = model.graph.initializers[name], WeightTensor(weight, name)
        value.const_value, value.shape, value.type = tensor, tensor.shape, ir.TensorType(weight.dtype)
    return model
