"""A resumed build: a tensor stays only if the same search would give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qwen_export.graphs.quantization.packing import QuantFormat
from qwen_export.graphs.quantization.precision_plan import GroupFormat, PrecisionPlan, default_plan
from qwen_export.graphs.quantization.quantized_weights import packed_weight
from qwen_export.graphs.quantization.scale_search import NUMPY_SEARCH, NumpySearch, ScaleSearch
from qwen_export.graphs.weights.expression import StoredWeight, add_weight
from qwen_export.graphs.weights.journal import Journal, key_of
from qwen_export.graphs.weights.weight_writer import Resume, write_weights
from qwen_export.plugins.native.native_library import find_library
from qwen_export.plugins.native.native_search import find_search

Floats = npt.NDArray[np.float32]
NAMES = ("layers.0.mlp.down_proj.weight", "layers.1.mlp.down_proj.weight")


@dataclass(frozen=True)
class OtherSearch(NumpySearch):
    """A search with other results, as another library has in the last bits."""

    name: str = "other"

    def scales(self, w: Floats, shares: Sequence[float], top: float) -> Floats:
        return NUMPY_SEARCH.scales(w, shares, top) * np.float32(1.25)


class Source:
    def rows(self, name: str, start: int, stop: int) -> Floats:
        return np.random.default_rng(len(name)).normal(size=(64, 64)).astype(np.float32)[start:stop]


def model_of(search: ScaleSearch) -> ir.Model:
    plan = PrecisionPlan(default_plan("int4").groups, search=search)
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="weights")
    for name in NAMES:
        weight = StoredWeight(name, (64, 64), ir.DataType.FLOAT)
        add_weight(graph, name, packed_weight(weight, plan.of_weight(weight)))
    return ir.Model(graph, ir_version=10)


def write(path: Path, search: ScaleSearch, *, stop_after: int | None = None) -> tuple[bytes, list[str]]:
    """The file of weights and the tensors that were made for it; `stop_after` interrupts after that many."""
    made: list[str] = []

    def progress(name: str, count: int) -> None:
        if stop_after is not None and len(made) == stop_after:
            raise KeyboardInterrupt
        made.append(name)

    write_weights([model_of(search)], Source(), path, progress, jobs=1, resume=Resume(Journal(path.parent / "journal"), lambda name: name))
    return path.read_bytes(), [name for name in made if name in NAMES]


def test_a_tensor_of_another_search_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole, _ = write(tmp_path / "whole" / "weights", OtherSearch())
    assert whole != write(tmp_path / "weights", NUMPY_SEARCH)[0]
    resumed, made = write(tmp_path / "weights", OtherSearch())
    assert made == list(NAMES)
    assert resumed == whole


def test_a_tensor_of_the_same_search_stays(tmp_path: Path) -> None:
    whole, made = write(tmp_path / "weights", NUMPY_SEARCH)
    assert made == list(NAMES)
    again, made = write(tmp_path / "weights", NUMPY_SEARCH)
    assert made == [] and again == whole


def test_who_does_not_search_does_not_matter() -> None:
    """Rounding to nearest is the same for all."""
    weight = StoredWeight(NAMES[0], (64, 64), ir.DataType.FLOAT)
    keys = set()
    for search in (NUMPY_SEARCH, OtherSearch()):
        chosen = PrecisionPlan(default_plan("int8").groups, search=search).of_weight(weight)
        assert chosen == GroupFormat("int8") and chosen.quant == QuantFormat(8, 32)
        keys.add(key_of(packed_weight(weight, chosen), lambda name: name))
    assert len(keys) == 1


@pytest.mark.skipif(find_library("cpu") is None, reason="the CPU plugin is not built")
def test_the_plugins_search_has_the_name_of_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, library = find_search(), find_library("cpu")
    assert found is not None and library is not None
    other = tmp_path / library.name
    other.write_bytes(library.read_bytes() + b"\0")
    monkeypatch.setenv("QWEN_EXPORT_CPU_PLUGIN", str(other))
    changed = find_search()
    assert changed is not None and changed.name != found.name
