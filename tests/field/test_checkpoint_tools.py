"""What tools leave in a checkpoint directory, each with its outcome; the matrix in docs/checkpoints.md lists them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_export.building.build_plan import plan_build
from qwen_export.errors import QwenExportError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from tests.support.checkpoint_cases import CASES, NOTED, REFUSED, CheckpointCase
from tests.support.checkpoint_matrix import DOCUMENT, document
from tests.support.family import tiny_config


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.tool}: {case.what}")
def test_every_case_has_its_outcome(make_checkpoint: Callable[..., Path], case: CheckpointCase) -> None:
    path = make_checkpoint(tiny_config(vision=False), with_mtp=False)
    case.change(path)
    if case.outcome == REFUSED:
        with pytest.raises(QwenExportError) as raised:
            plan_build(open_checkpoint(path))
        assert case.mention in str(raised.value) and "\n" not in str(raised.value)
        return
    checkpoint = open_checkpoint(path)
    plan_build(checkpoint)
    if case.outcome == NOTED:
        assert any(case.mention in note for note in checkpoint.notes), checkpoint.notes
    else:
        assert not checkpoint.notes


def test_the_matrix_in_the_documents_is_current() -> None:
    """`python -m tests.support.checkpoint_matrix` writes it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert document(text) == text
