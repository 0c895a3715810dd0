"""Changed checkpoints: configuration, index, headers, tokenizer and its configuration, template, generation settings. Each is read with the
right result, or refused with one message, in bounded time and memory.

The right result is that of the safetensors library for weights and that of transformers for what a configuration means. What a build takes
of the text files, a run can use.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoint_mutations import FILES
from tests.support.worker_outcomes import outcomes, seeds


@pytest.mark.parametrize("numbers", seeds(20, 60))
def test_changed_files_are_read_right_or_refused(numbers: range, tiny_checkpoint: Path) -> None:
    cases = [f"{kind} {number}" for kind in FILES for number in numbers]
    found = list(outcomes("tests.support.checkpoint_worker", tiny_checkpoint, cases))
    assert not [case for case in found if case["outcome"].startswith("failure")]
    for kind in FILES:
        assert {"success", "error"} <= {case["outcome"] for case in found if case["case"].startswith(f"{kind} ")}, kind
