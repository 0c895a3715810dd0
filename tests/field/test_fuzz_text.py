"""Changed text files of a checkpoint: tokenizer, its configuration, template, generation settings. What a build takes, a run can use; all
else is refused with one message, in bounded time and memory.

`QWEN_EXPORT_FUZZ=1000` tries that many changes of each file instead of a few dozen.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.worker_outcomes import outcomes

CASES = int(os.environ.get("QWEN_EXPORT_FUZZ", "60"))
WORKER = "tests.support.checkpoint_worker"


@pytest.mark.parametrize("kind", ["tokenizer", "tokenizer_config", "template", "generation_config"])
def test_changed_files_work_or_are_refused(kind: str, tiny_checkpoint: Path) -> None:
    found = list(outcomes(WORKER, tiny_checkpoint, [f"{kind} {seed}" for seed in range(CASES)]))
    assert not [case for case in found if case["outcome"].startswith("failure")]
    assert {"success", "error"} <= {case["outcome"] for case in found}
