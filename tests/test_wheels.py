"""What is published: archives and wheels that are the same to the byte, complete, and run a bundle with this project's kernels."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.built_packages import PROJECT, copied_tree, packaged
from tests.support.source_tree import ROOT, TREES, tracked_files


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_packages_are_the_same_to_the_byte(tmp_path: Path, kind: str) -> None:
    """Whenever the files were written."""
    tree = copied_tree(tmp_path / "source")
    first = packaged(tree, kind)
    content = first.read_bytes()
    first.unlink()
    shutil.rmtree(tree / "build", ignore_errors=True)
    for path in tree.rglob("*.py"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    assert packaged(tree, kind).read_bytes() == content


def test_a_release_needs_its_kernels(tmp_path: Path) -> None:
    """Without a compiler a wheel for any platform is made, and none where they are required."""
    tree = copied_tree(tmp_path / "source")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        packaged(tree, "wheel", QWEN_EXPORT_KERNELS="require", CXX="no-such-compiler")
    assert b"the CPU kernels were not compiled" in failed.value.stderr
    wheel = packaged(tree, "wheel", QWEN_EXPORT_KERNELS="auto", CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_sdist_is_complete() -> None:
    """All that git tracks, but what only this repository needs."""
    patterns = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    for path in tracked_files():
        name = path.relative_to(ROOT).as_posix()
        top = name.partition("/")[0]
        if top not in (".ci", ".github", ".gitignore", ".gitattributes"):
            assert top in (*TREES, *PROJECT) or f"graft {top}" in patterns or f"include {top} " in patterns or top in patterns, name


def test_the_workflows_build_what_the_release_publishes() -> None:
    """Names that are in two files."""
    release, wheels = ((ROOT / ".github" / "workflows" / f"{name}.yml").read_text() for name in ("release", "wheels"))
    assert "./.github/workflows/wheels.yml" in release and "workflow_call" in wheels
    assert (ROOT / ".ci" / "check_wheel.py").is_file() and "check_wheel.py" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.runtime_only
@pytest.mark.slow
def test_a_wheel_with_kernels_runs_a_bundle_that_was_built_with_them(demo_bundle: Path, tmp_path: Path) -> None:
    """`pip wheel` compiles them; the environment has the runtime extras alone."""
    tree, out, home = copied_tree(tmp_path / "source"), tmp_path / "wheel", tmp_path / "venv"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"QWEN_EXPORT_KERNELS": "require"}
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(out), str(tree)], check=True, env=environment, cwd=tmp_path
    )
    (wheel,) = out.iterdir()
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as file:
        assert "qwen_export/plugins/native/libqwen_export_cpu.so" in file.namelist()
    venv.create(home, with_pip=True)
    python = str(home / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{wheel}[onnxruntime]"], check=True, cwd=tmp_path, env=environment)
    shutil.copytree(demo_bundle, tmp_path / "bundle")

    def run(*arguments: str) -> str:
        words = [python, "-m", "qwen_export", *arguments]
        return subprocess.run(words, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout

    report = json.loads(run("check", "bundle", "--json"))
    assert report["runnable"]
    assert run("run", "bundle", "def add(a, b):", "--max-new-tokens", "8", "--greedy")
    subprocess.run([python, str(ROOT / ".ci" / "check_wheel.py")], check=True, cwd=tmp_path, env=environment)
