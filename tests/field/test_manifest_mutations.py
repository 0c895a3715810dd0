"""Changed manifests: each gives the same output or one error, without a crash, a hang, or memory beyond a bound.

`QWEN_EXPORT_FUZZ=10000` tries that many changes instead of a few hundred. "damaged" manifests keep their digest; "forged" ones get a new
one, as a hostile maker would give them.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_export import build
from qwen_export.building.static_plan import StaticOptions
from tests.support.manifest_worker import answer

CASES = int(os.environ.get("QWEN_EXPORT_FUZZ", "240"))
LIMIT_S = 60
"""Far more than a case needs: it is for cases that never end."""
# What a maker can choose freely: no other field has it, and the text of a model is the maker's in any case.
FREE = ("rotary.", "stop_ids", "weights.", "states.", "speculation", "model.")


def outcomes(bundle: Path, cases: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run the cases in a process; one that ends or hangs is the outcome of its case, and another goes on behind it."""
    waiting = list(cases)
    while waiting:
        command = [sys.executable, "-m", "tests.support.manifest_worker", str(bundle)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as worker:
            lines: queue.Queue[str] = queue.Queue()
            assert worker.stdin and worker.stdout and worker.stderr
            reader = threading.Thread(target=_forward, args=(worker.stdout, lines), daemon=True)
            reader.start()
            feeder = threading.Thread(target=_feed, args=(worker.stdin, list(waiting)), daemon=True)
            feeder.start()
            errors = threading.Thread(target=worker.stderr.read, daemon=True)
            errors.start()
            while waiting:
                try:
                    line = lines.get(timeout=LIMIT_S)
                except queue.Empty:
                    line = ""
                    worker.kill()
                    yield {"case": waiting.pop(0), "where": "", "outcome": "failure: it does not end"}
                    break
                if not line:
                    yield {"case": waiting.pop(0), "where": "", "outcome": f"failure: the process ended with {worker.wait()}"}
                    break
                waiting.pop(0)
                yield json.loads(line)


def _forward(source: Any, lines: queue.Queue[str]) -> None:
    for line in source:
        lines.put(line)
    lines.put("")


def _feed(target: Any, cases: Sequence[str]) -> None:
    with contextlib.suppress(OSError):  # the process may end before it has read all
        target.write("".join(f"{case}\n" for case in cases))
        target.close()


@pytest.fixture(scope="module")
def static_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("static") / "bundle"
    return build(tiny_checkpoint, output, target="onnx", max_context=128, options=StaticOptions(16))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_changed_manifests_give_the_same_output_or_one_error(kind: str, tiny_bundle: Path, static_bundle: Path) -> None:
    bundle, count = (tiny_bundle if kind == "dynamic" else static_bundle), CASES // 2
    unchanged = answer(bundle)
    assert len(json.loads(unchanged)) == 6
    cases = [f"forged {seed}" for seed in range(count * 3 // 4)] + [f"damaged {seed}" for seed in range(count // 4)]
    wrong, same, refused = [], 0, 0
    for found in outcomes(bundle, cases):
        outcome = found["outcome"]
        same += outcome == unchanged
        refused += outcome == "error"
        free = found["case"].startswith("forged") and any(name in found["where"] for name in FREE)
        if outcome.startswith("failure") or (outcome not in ("error", unchanged) and not free):
            wrong.append(found)
    assert not wrong, "\n".join(map(str, wrong[:20]))
    assert same and refused > count // 2
