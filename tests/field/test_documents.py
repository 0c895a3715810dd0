"""The documents and the sources: no conflict markers anywhere, and numbers that are those of the code."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from qwen_export.commands.cli import COMMANDS
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
    [stated] = re.findall(r"\(limits ([0-9.]+) for int8, ([0-9.]+) for int4\)", quantization)
    assert [float(value) for value in stated] == [RMS_TOLERANCE["int8"], RMS_TOLERANCE["int4"]]
    [activations] = re.findall(r"limit: rms error ([0-9.]+) standard deviations", quantization)
    assert float(activations) == RMS_TOLERANCE["activations"]
    architecture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    limits = re.search(r"^\| limit \| ([0-9e.-]+) \| ([0-9e.-]+) \|", architecture, re.M)
    if limits:
        assert [float(value) for value in limits.groups()] == [LAYER_TOLERANCE["fp32"], LAYER_TOLERANCE["fp16"]]


def blocks(language: str) -> list[str]:
    """The blocks of code in the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", readme, re.M | re.S)


def test_the_readme_names_commands_and_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    lines = "\n".join(blocks(""))
    assert set(re.findall(r"^qwen-export +(\S+)", lines, re.M)) == set(COMMANDS) - {"package", "rebuild"}
    assert set(re.findall(r"\[([a-z,-]+)\]", lines)) <= set(extras)
    assert "pip install qwen-export" not in lines and "pip install 'qwen-export" not in lines, "no package index has it"


def test_the_python_lines_of_the_readme_run_after_its_commands(
    demo_checkpoint: Path, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = blocks("python")
    monkeypatch.chdir(tmp_path)
    Path("Qwen3.5-0.8B").symlink_to(demo_checkpoint)
    Path("bundles").mkdir()
    Path("bundles/qwen").symlink_to(demo_bundle)  # what the commands have left
    exec(compile(code.replace("enable_thinking=False", "enable_thinking=False, max_new_tokens=8"), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
