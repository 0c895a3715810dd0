"""A bundle's native library is code: it is loaded silently only where a build of the user has made it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from qwen_export.commands.cli import main
from qwen_export.errors import BundleError, ParameterError
from qwen_export.manifest import load_manifest
from qwen_export.plugins.native.native_library import find_library
from qwen_export.runtimes import load
from qwen_export.runtimes.backends.native_libraries import is_known, remember

pytestmark = pytest.mark.skipif(not find_library("cpu"), reason="the CPU plugin is not compiled")


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has built nothing; returns the directory of this user's data."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "qwen_export" and record.levelno == logging.WARNING]


def test_a_library_of_an_own_build_is_loaded_silently(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("qwen_export").propagate = True
    load(tiny_bundle)
    assert not notices(caplog)


@pytest.mark.usefixtures("stranger")
def test_another_one_is_announced(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("qwen_export").propagate = True
    load(tiny_bundle)
    [notice] = notices(caplog)
    assert "native code" in notice and load_manifest(tiny_bundle).plugins[0] in notice
    caplog.clear()
    load(tiny_bundle, native="allow")
    assert not notices(caplog)


def test_refuse_loads_no_native_library(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BundleError, match="native code, which is refused"):
        load(tiny_bundle, native="refuse")
    with pytest.raises(ParameterError, match="native"):
        load(tiny_bundle, native="sometimes")
    for command in (["run", str(tiny_bundle), "x"], ["check", str(tiny_bundle)], ["bench", str(tiny_bundle)]):
        with pytest.raises(SystemExit):
            main([*command, "--no-native"])
        assert "--native" in capsys.readouterr().err


def test_the_command_line_prints_the_notice(tiny_bundle: Path, stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", str(tiny_bundle), "x", "--max-new-tokens", "1"])
    assert capsys.readouterr().err.count("warning: ") == 1
    main(["check", str(tiny_bundle)])
    found = capsys.readouterr()
    assert "not made by a build of yours" in found.out and "warning" not in found.err
    remember(load_manifest(tiny_bundle).files[name].sha256 for name in load_manifest(tiny_bundle).plugins)
    assert json.loads((stranger / "qwen-export" / "native-libraries.json").read_text())
    main(["run", str(tiny_bundle), "x", "--max-new-tokens", "1"])
    assert "warning: " not in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "{}", "[1, null]", "[" * 100_000])
def test_a_damaged_list_knows_nothing(stranger: Path, content: str) -> None:
    path = stranger / "qwen-export" / "native-libraries.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert not is_known("0" * 64)
    remember(["0" * 64])
    assert is_known("0" * 64)
