"""`package --windows`: one zip with everything, usable where paths, names and encodings are Windows'."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tree_sitter_powershell

from qwen_export import build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.bundles import packaging_windows
from qwen_export.bundles.packaging_windows import package_windows, requirements
from qwen_export.bundles.windows_wheels import PYTHONS, fetch_wheels, missing_wheels
from qwen_export.commands.cli import main
from qwen_export.errors import QwenExportError
from qwen_export.long_paths import reachable, without_limit
from qwen_export.manifest import load_manifest, write_manifest
from qwen_export.runtimes import SamplingParams, load


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


def test_the_script_passes_any_argument_to_the_command_line(unpacked: Path) -> None:
    """What run.ps1 starts: quotes, empty arguments and other scripts arrive as they are, nothing of the user's environment does, and a pipe
    gets UTF-8."""
    environment = {"PATH": "", "PYTHONPATH": str(unpacked), "PYTHONIOENCODING": "ascii"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-X", "utf8", str(unpacked / "app")]
        given = environment | {"QWEN_EXPORT_ARGUMENTS": json.dumps(arguments)}
        return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=unpacked, env=given)

    done = run('say "hi" \\ Grüße 你好', "--json", "--max-new-tokens", "2", "--device", "cpu", "--threads", "1")
    assert json.loads(done.stdout)["usage"]["completion_tokens"] >= 1, done.stderr
    assert "arguments ( 語)" in run("a", "", "語").stderr


def test_scripts_are_as_windows_reads_them(unpacked: Path) -> None:
    script = (unpacked / "run.ps1").read_bytes()
    assert script.startswith(b"\xef\xbb\xbf"), "without the mark PowerShell 5 reads another encoding"
    assert b"\r\n" in script and b"\n" not in script.replace(b"\r\n", b"")
    text = script.decode("utf-8-sig")
    assert "PYVERSION" not in text and "$version = '3.12'" in text
    assert "PYVERSION" not in (unpacked / "README.txt").read_text(encoding="utf-8")


def test_the_script_has_no_errors(unpacked: Path) -> None:
    """By the grammar everywhere, and by PowerShell where it is: both editions on Windows."""
    assert not syntax_errors((unpacked / "run.ps1").read_bytes().removeprefix(b"\xef\xbb\xbf"))
    assert syntax_errors(b"if ($x { throw 'a' }\n"), "the parser sees errors"
    code = "$e = $null; [void][Management.Automation.Language.Parser]::ParseFile($args[0], [ref]$null, [ref]$e); $e; exit $e.Count"
    for shell in filter(None, map(shutil.which, ("pwsh", "powershell"))):
        subprocess.run([shell, "-NoProfile", "-Command", f"& {{ {code} }} '{unpacked / 'run.ps1'}'"], check=True)


def test_the_script_follows_its_rules(unpacked: Path) -> None:
    """What goes wrong in folders with brackets, spaces or a semicolon, and where stderr is redirected."""
    lines = [line for line in (unpacked / "run.ps1").read_text(encoding="utf-8-sig").splitlines() if not line.startswith("#")]
    text = "\n".join(lines)
    assert not re.search(r"Test-Path (?!-LiteralPath)|Get-Content|Invoke-Expression|PYTHONPATH|@args", text)
    calls = [at for at, line in enumerate(lines) if re.search(r"& (py|\$python) ", line)]
    assert len(calls) == 3 and all(" -I " in lines[at] for at in calls)
    assert lines.index("$ErrorActionPreference = 'Continue'") < calls[0]
    for at in calls:
        assert any("$LASTEXITCODE" in line for line in lines[at : at + 2]), "a program's exit code is looked at"


def syntax_errors(script: bytes) -> list[str]:
    """Lines that the grammar of PowerShell does not take."""
    from tree_sitter import Language, Parser

    tree = Parser(Language(tree_sitter_powershell.language())).parse(script)
    pending, found = [tree.root_node], []
    while pending:
        node = pending.pop()
        if node.is_error or node.is_missing:
            found.append(f"{node.start_point.row + 1}: {script[node.start_byte : node.end_byte].decode()}")
        pending += node.children
    return found


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


def wheel(directory: Path, name: str, requires: tuple[str, ...] = (), inside: str = "") -> None:
    """A wheel of nothing."""
    project, version, *_ = name.split("-")
    with zipfile.ZipFile(directory / name, "w") as archive:
        archive.writestr(f"{project}-{version}.dist-info/METADATA", "".join(f"Requires-Dist: {line}\n" for line in requires))
        archive.writestr(inside or f"{project}.py", "")


def test_wheels_for_windows_go_in(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        wheel(Path(command[command.index("--dest") + 1]), "numpy-2-cp313-cp313-win_amd64.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    archive = package_windows(bundle, tmp_path / "a.zip", wheels=True, python="3.13")
    assert "win_amd64" in asked[0] and "3.13" in asked[0]
    with zipfile.ZipFile(archive) as file:
        assert "a/wheels/numpy-2-cp313-cp313-win_amd64.whl" in file.namelist()
        assert "$version = '3.13'" in file.read("a/run.ps1").decode("utf-8-sig")


def test_what_windows_alone_requires_is_missed(tmp_path: Path) -> None:
    wheel(
        tmp_path,
        "click-8.5-py3-none-any.whl",
        ('colorama; platform_system == "Windows"', 'uvloop; sys_platform != "win32"', 'x; extra == "a"'),
    )
    wheel(tmp_path, "rich-15-py3-none-any.whl", ("click>=9", 'tomli; python_version < "3.12"', "Pygments<3"))
    wheel(tmp_path, "pygments-2.21-py3-none-any.whl")
    assert missing_wheels(tmp_path, "3.12") == ["click requires colorama", "rich requires click>=9"]
    assert "rich requires tomli" in missing_wheels(tmp_path, "3.11")


@pytest.mark.parametrize("wrong", [{"requires": ("colorama",)}, {"inside": "a/" * 40 + "b" * 40 + ".py"}])
def test_wheels_that_would_not_install_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]) -> None:
    def pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        wheel(tmp_path, "click-8.5-py3-none-any.whl", **wrong)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(QwenExportError, match=r"not among|Windows may not take"):
        fetch_wheels("click==8.5\n", tmp_path, "3.12")


@pytest.mark.network
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("device", ["dml", "cpu"])
def test_every_requirement_has_a_wheel_for_windows(tmp_path: Path, device: str, python: str) -> None:
    fetch_wheels(requirements(device), tmp_path, python)
    assert len(list(tmp_path.glob("*.whl"))) > len(requirements(device).split())


def test_a_long_path_of_windows_gets_the_prefix_without_a_limit() -> None:
    name = "Müller & Söhne\\" * 20
    assert without_limit("C:\\" + name) == "\\\\?\\C:\\" + name
    assert without_limit("\\\\server\\share\\" + name) == "\\\\?\\UNC\\server\\share\\" + name
    for kept in ("C:\\Modelle", "\\\\?\\C:\\" + name, "\\\\.\\pipe\\" + name):
        assert without_limit(kept) == kept


def test_a_bundle_in_a_long_folder_with_any_name_loads(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Jürgen Groß" / "模型" / ("[long] " + "x" * 90) / ("y" * 90)
    copy = reachable(folder)
    copy.mkdir(parents=True)
    for path in bundle.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    answer = load(folder, device="cpu", threads=1).complete("Hello", sampling=SamplingParams(greedy=True), max_new_tokens=2)
    assert isinstance("".join(answer), str) and answer.tokens


def test_the_command(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["package", str(bundle), "-o", str(tmp_path / "a.zip"), "--windows"])
    assert "a.zip" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        assert json.loads(file.read("a/bundle/manifest.json"))["target"]["device"] == "dml"
