"""`verify` holds the weights of one layer at a time, and gets the logits of the whole model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.graphs.quantization.precision_plan import load_plan
from qwen_export.verification import streamed_decoder as streamed
from qwen_export.verification.streamed_decoder import streamed_decoder
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize

IDS = [1, 5, 300, 7, 5, 511]


@pytest.mark.parametrize("form", ["plain", "tied", "experts", "int4", "blocks"])
def test_streamed_weights_give_the_same_logits(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tied=form == "tied", moe=form == "experts", vision=False)
    source = open_checkpoint(synthesize(config, tmp_path / "checkpoint"))
    plan = load_plan("int4", None, tied=False, stored=()) if form == "int4" else None
    if form == "blocks":
        monkeypatch.setattr(streamed, "HEAD_ROWS", 100)
    whole = EagerSequence(load_decoder(source, plan), 16).read(IDS)
    np.testing.assert_allclose(
        EagerSequence(streamed_decoder(source, plan), 16).read(IDS), whole, atol=1e-6 if form == "blocks" else 0, rtol=0
    )


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    source = open_checkpoint(synthesize(tiny_config(vision=False, layers=8), tmp_path / "checkpoint"))
    seen: list[tuple[int, int]] = []
    filled: list[int] = []
    model = streamed_decoder(source, None, lambda layer, count: seen.append((layer, count)))

    def count(*_: object) -> None:
        filled.append(sum(any(not p.is_meta for p in layer.parameters()) for layer in model.layers))

    for layer in model.layers:
        layer.mlp.register_forward_hook(count)
    EagerSequence(model, 16).read(IDS)
    assert filled == [1] * 8
    assert seen == [(layer, 8) for layer in range(1, 9)]
    assert all(parameter.is_meta for parameter in model.parameters())
