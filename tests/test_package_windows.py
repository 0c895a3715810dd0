"""`package --windows`: one zip with everything, usable where paths, names and encodings are Windows'."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qwen_export import build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.bundles import packaging_windows
from qwen_export.bundles.packaging_windows import package_windows, requirements
from qwen_export.commands.cli import main
from qwen_export.errors import QwenExportError
from qwen_export.manifest import load_manifest, write_manifest


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("windows") / "bundle"
    return build(tiny_checkpoint, output, target="directml", device="dml", precision="fp16", max_context=128, options=StaticOptions(16))


@pytest.fixture(scope="module")
def unpacked(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of `bundle`, in a folder whose name has what paths on Windows have."""
    directory = tmp_path_factory.mktemp("target") / "Bücher und Modelle"
    archive = package_windows(bundle, directory.parent / "Qwen (tiny).zip")
    with zipfile.ZipFile(archive) as file:
        assert file.testzip() is None
        file.extractall(directory)
    return directory / "Qwen-tiny"


def test_the_package_runs_from_its_own_modules(unpacked: Path) -> None:
    """What run.ps1 starts, with nothing of this checkout on the path; on the CPU, where this test runs."""
    code = f"""
import sys
sys.path[:0] = [{str(unpacked / "app")!r}]
from qwen_export.runtimes import SamplingParams, load
import qwen_export
assert qwen_export.__file__.startswith({str(unpacked)!r}), qwen_export.__file__
model = load({str(unpacked / "bundle")!r}, device="cpu", threads=1)
answer = model.complete("Hello", sampling=SamplingParams(greedy=True), max_new_tokens=4)
"".join(answer)
assert len(answer.tokens) >= 1
assert not {{"torch", "onnx"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=unpacked, env={"PATH": "", "PYTHONUTF8": "1"})


def test_the_command_line_answers_from_the_package(unpacked: Path) -> None:
    environment = {"PATH": "", "PYTHONUTF8": "1", "PYTHONPATH": str(unpacked / "app")}
    command = [sys.executable, "-P", "-m", "qwen_export", "run", "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=unpacked, env=environment)
    assert "Usage" in done.stdout


def test_scripts_are_as_windows_reads_them(unpacked: Path) -> None:
    script = (unpacked / "run.ps1").read_bytes()
    assert script.startswith(b"\xef\xbb\xbf"), "without the mark PowerShell 5 reads another encoding"
    assert b"\r\n" in script and b"\n" not in script.replace(b"\r\n", b"")
    text = script.decode("utf-8-sig")
    assert "$PSScriptRoot" in text and "PYTHONUTF8" in text and "LongPathsEnabled" in text
    assert "PYVERSION" not in text


def test_requirements_are_pinned() -> None:
    lines = requirements("dml").split()
    assert lines[0] == "onnxruntime-directml==1.24.4"
    assert all("==" in line for line in lines)
    assert any(line.startswith("colorama") for line in lines), "click needs it on Windows"
    assert requirements("cpu").split()[0].startswith("onnxruntime==")


def test_names_in_the_package_fit_windows(bundle: Path, tmp_path: Path) -> None:
    archive = package_windows(bundle, tmp_path / "a.zip")
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
        assert {file.getinfo(name).date_time for name in names} == {(1980, 1, 1, 0, 0, 0)}
    assert all(name.isascii() and "\\" not in name and ":" not in name and len(name) <= 120 for name in names)
    assert {"a/requirements.txt", "a/run.ps1", "a/bundle/manifest.json", "a/app/qwen_export/runtimes/model.py"} <= set(names)
    assert not [name for name in names if "torch" in name or "/graphs/" in name]


@pytest.mark.parametrize("name", ["aux.txt", "a:b.txt", "dot.", "x" * 120])
def test_a_name_that_windows_refuses_is_an_error(bundle: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaging_windows, "package_files", lambda *_: iter([(f"bundle/{name}", "text")]))
    with pytest.raises(QwenExportError, match="Windows does not take"):
        package_windows(bundle, tmp_path / "a.zip")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_packaged_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(QwenExportError, match=r"\.zip"):
        package_windows(bundle, tmp_path / "folder")
    (tmp_path / "there.zip").touch()
    with pytest.raises(QwenExportError, match="exists already"):
        package_windows(bundle, tmp_path / "there.zip")


def test_a_bundle_with_a_native_library_is_refused(bundle: Path, tmp_path: Path) -> None:
    manifest = load_manifest(bundle)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in manifest.files:
        (copy / name).write_bytes((bundle / name).read_bytes())
    changed = dataclasses.replace(manifest, plugins=("decoder.onnx",), target=dataclasses.replace(manifest.target, platform="linux x86_64"))
    write_manifest(copy, changed)
    with pytest.raises(QwenExportError, match="native library"):
        package_windows(copy, tmp_path / "a.zip")


def test_wheels_for_windows_go_in(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        Path(command[command.index("--dest") + 1], "numpy-2-cp312-win_amd64.whl").write_bytes(b"wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    archive = package_windows(bundle, tmp_path / "a.zip", wheels=True)
    assert "win_amd64" in asked[0] and "3.12" in asked[0]
    with zipfile.ZipFile(archive) as file:
        assert file.read("a/wheels/numpy-2-cp312-win_amd64.whl") == b"wheel"


def test_the_command(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["package", str(bundle), "-o", str(tmp_path / "a.zip"), "--windows"])
    assert "a.zip" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        assert json.loads(file.read("a/bundle/manifest.json"))["target"]["device"] == "dml"
