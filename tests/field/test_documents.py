"""The documents and the sources: no conflict markers anywhere, and numbers that are those of the code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from qwen_export.verification.layer_check import TOLERANCE as LAYER_TOLERANCE
from qwen_export.verification.logit_check import RMS_TOLERANCE

ROOT = Path(__file__).parents[2]
# In two parts, so that this file does not hold them.
MARKERS = re.compile("^(" + "|".join(re.escape(sign * 7) for sign in "<>|") + ")( |$)", re.M)


def texts() -> dict[str, str]:
    """The files of the repository that are text, by name."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    names = (
        listed.stdout.decode().split("\0")[:-1] if listed.returncode == 0 else [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.*")]
    )
    found = {}
    for name in names:
        path = ROOT / name
        if path.is_file() and path.stat().st_size < 2 << 20:
            try:
                found[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    return found


def test_no_file_has_conflict_markers() -> None:
    assert not [name for name, text in texts().items() if MARKERS.search(text)]


def test_the_tolerances_of_the_documents_are_those_of_the_code() -> None:
    quantization = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    [stated] = re.findall(r"\(limits ([0-9.]+) for int8, ([0-9.]+) for int4, ([0-9.]+) for fp8\)", quantization)
    assert [float(value) for value in stated] == [RMS_TOLERANCE[name] for name in ("int8", "int4", "fp8")]
    [activations] = re.findall(r"limit: rms error ([0-9.]+) standard deviations", quantization)
    assert float(activations) == RMS_TOLERANCE["activations"]
    architecture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    limits = re.search(r"^\| limit \| ([0-9e.-]+) \| ([0-9e.-]+) \|", architecture, re.M)
    if limits:
        assert [float(value) for value in limits.groups()] == [LAYER_TOLERANCE["fp32"], LAYER_TOLERANCE["fp16"]]
