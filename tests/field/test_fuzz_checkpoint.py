"""Changed checkpoints: configuration, index, headers. Each is read with the right result, or refused with one message.

`QWEN_EXPORT_FUZZ=1000` tries that many changes of each file instead of a few dozen. The right result is that of the safetensors library for
weights and that of transformers for what a configuration means.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.worker_outcomes import outcomes

CASES = int(os.environ.get("QWEN_EXPORT_FUZZ", "60"))
WORKER = "tests.support.checkpoint_worker"


@pytest.mark.parametrize("kind", ["config", "index", "header"])
def test_changed_files_are_read_right_or_refused(kind: str, tiny_checkpoint: Path) -> None:
    found = list(outcomes(WORKER, tiny_checkpoint, [f"{kind} {seed}" for seed in range(CASES)]))
    assert not [case for case in found if case["outcome"].startswith("failure")]
    assert {"success", "error"} <= {case["outcome"] for case in found}
