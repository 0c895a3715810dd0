"""`python -m tests.support.traced_command build CHECKPOINT -o BUNDLE`: the command line, in a process of its own, with the traces of this
run of the tests (`shared_captures`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TRACES = "QWEN_EXPORT_TEST_TRACES"
"""The variable that names their folder, which the tests set."""


if __name__ == "__main__":
    from qwen_export.commands.cli import main
    from tests.support.shared_captures import share_captures

    share_captures(setattr, Path(os.environ[TRACES]))
    main(sys.argv[1:])
