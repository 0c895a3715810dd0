"""Which rows get logits: any of the B*T rows of a call, sequence by sequence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from qwen_export import build
from qwen_export.manifest import load_manifest
from qwen_export.plugins.native.native_library import LIBRARIES, find_library
from qwen_export.runtimes.decoding.logit_rows import Rows, Top
from tests.support.kernel_families import lengths

TOLERANCE = 1e-5


def first_call(bundle: Path, ids: np.ndarray, rows: list[int]) -> dict[str, np.ndarray]:
    """The results of a first call over ids [B,T] by name."""
    manifest = load_manifest(bundle)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    library = find_library("cpu")
    if library is not None:
        options.register_custom_ops_library(str(library))
    graph = manifest.graphs["decoder"]
    session = ort.InferenceSession(bundle / graph.file, options, providers=["CPUExecutionProvider"])
    B, T = ids.shape
    angles = np.arange(T, dtype=np.float32)[:, None] * np.asarray(manifest.rotary.inv_freq, np.float32)
    feeds = {
        "input_ids": ids,
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        **lengths(session, [0] * B, T),
        "accepted": np.zeros(B, np.int64),
        "commit": np.full(B, T, np.int64),
        "logit_rows": np.array(rows, np.int64),
    }
    sizes = {"B": B, "S": T, "P": 0}
    for state in graph.states:
        feeds[state.name] = np.zeros([d if isinstance(d, int) else sizes[d] for d in state.shape], np.float32)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


@pytest.fixture(scope="module", params=["plugin", "onnxruntime"])
def bundle(request: pytest.FixtureRequest, demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with speculation, with the CPU plugin and without."""
    if request.param == "plugin":
        if find_library("cpu") is None:
            pytest.skip("the CPU plugin is not built")
        return Path(request.getfixturevalue("demo_bundle"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, LIBRARIES["cpu"].variable, "")
        return build(demo_checkpoint, tmp_path_factory.mktemp("without") / "demo")


def test_rows_are_chosen_per_sequence(bundle: Path) -> None:
    """Another number of rows of each sequence, in any order."""
    ids = np.random.default_rng(0).integers(0, 400, (3, 5))
    T, wanted = ids.shape[1], [(0, 4), (2, 0), (2, 3), (1, 1), (2, 4)]
    got = first_call(bundle, ids, [b * T + t for b, t in wanted])
    assert got["logits"].ndim == 2
    assert got["hidden"].shape[:2] == ids.shape
    alone = [first_call(bundle, ids[b : b + 1], list(range(T)))["logits"] for b in range(3)]
    for row, (b, t) in enumerate(wanted):
        assert np.abs(got["logits"][row] - alone[b][t]).max() <= TOLERANCE * np.abs(alone[b][t]).max()
    if "top_ids" in got:
        assert got["top_ids"].shape == got["top_logits"].shape == (len(wanted), 64)
        np.testing.assert_array_equal(got["top_ids"][:, 0], got["logits"].argmax(1))


@pytest.mark.parametrize("wrong", [None, np.nan])
def test_the_largest_of_every_row(wrong: float | None) -> None:
    array = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    array[3, 7] = array[3, 11] = 9
    if wrong is not None:
        array[1, 20] = wrong
    order = np.argsort(-array, axis=1, kind="stable")[:, :4]
    if wrong is not None:
        order[1] = [20, *order[1, :3]]
    largest = np.take_along_axis(array, order, axis=1)
    top = Top(memoryview(largest.ravel()), memoryview(order.astype(np.int32).ravel()))
    for rows in (Rows.of(array), Rows(lambda: array, lambda: top, 4)):
        assert rows.argmax() == array.argmax(axis=1).tolist() == [row.argmax() for row in rows]
