"""Options of engines that a flavour of TensorRT cannot carry out are refused before the build, and no timing cache is lost."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_export.commands.cli import main
from qwen_export.engine_options import EngineOptions
from qwen_export.errors import BuildError, UnsupportedError
from qwen_export.plugins.tensorrt.build_engine import check_options, open_timing_cache
from qwen_export.runtimes.backends.tensorrt.kernel_cache import write_whole
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import FLAVOURS, Library, minimum_cuda


def library(flavour: str) -> Library:
    capabilities = SimpleNamespace(__members__={"SM89": 1, "SM120": 2, "CURRENT": 3})
    return Library(FLAVOURS[flavour], SimpleNamespace(ComputeCapability=capabilities), "9.9", SimpleNamespace(errors=[]))


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"hardware_compatibility": "ampere+"}, r"no compatibility of hardware: .*sms lists.*Leave out hardware_compatibility"),
        ({"version_compatible": True}, r"no compatibility of versions: .*only the engines that it has built.*Leave out version_compatible"),
        ({"tiling": "full"}, r"no search for tilings: .*same program.*Leave out tiling"),
        ({"timing_cache": Path("t")}, r"no timing cache: .*Leave out timing_cache"),
    ],
)
def test_what_rtx_would_leave_aside_is_refused(wish: dict[str, Any], message: str) -> None:
    options = EngineOptions(sms=("89",), **wish)
    with pytest.raises(UnsupportedError, match=message):
        check_options(library("tensorrt-rtx"), options, "89")
    check_options(library("tensorrt"), options, "89")


@pytest.mark.parametrize("flavour", list(FLAVOURS))
def test_weights_that_are_inputs_are_not_streamed(flavour: str) -> None:
    with pytest.raises(UnsupportedError, match=r"inside the engines, .*Set engine_weights to embedded"):
        check_options(library(flavour), EngineOptions(sms=("89",), weight_streaming=True), "89")
    check_options(library(flavour), EngineOptions(sms=("89",), weight_streaming=True, weights="embedded"), "89")


def test_the_full_library_builds_where_the_engine_runs() -> None:
    with pytest.raises(UnsupportedError, match=r"builds on the GPU that runs the engine: got SM 120 on SM 89"):
        check_options(library("tensorrt"), EngineOptions(sms=("120",)), "89")


@pytest.mark.parametrize(
    ("flavour", "installed", "cuda"),
    [
        ("tensorrt-rtx", {"tensorrt_rtx_cu13_bindings"}, "13.0"),
        ("tensorrt-rtx", {"tensorrt_rtx_cu12_bindings"}, "12.0"),
        ("tensorrt", {"tensorrt", "tensorrt_cu13"}, "13.0"),
        ("tensorrt", {"tensorrt_cu12"}, "12.0"),
    ],
)
def test_the_driver_that_engines_need_is_that_of_the_library(
    flavour: str, installed: set[str], cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return "9.9"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert minimum_cuda(flavour) == cuda


class _Config:
    """A builder's configuration; `takes`: whether it takes caches, as it does those of its own GPU and version."""

    def __init__(self, takes: bool = True) -> None:
        self.takes, self.given = takes, b"?"

    def create_timing_cache(self, data: bytes) -> Any:
        self.given = data
        return SimpleNamespace(serialize=lambda: data + b" and more")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        return self.takes and not ignore_mismatch


def test_a_timing_cache_grows_from_build_to_build(tmp_path: Path) -> None:
    options, config = EngineOptions(timing_cache=tmp_path / "new" / "cache"), _Config()
    for expected in (b"", b" and more"):
        cache = open_timing_cache(config, options)
        assert config.given == expected
        write_whole(tmp_path / "new" / "cache", cache.serialize())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cache"]
    assert open_timing_cache(config, EngineOptions()) is None


def test_the_timing_cache_of_another_gpu_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"of another")
    with pytest.raises(BuildError, match=r"not of this GPU and version of TensorRT \(.*cache\)\. Name another file"):
        open_timing_cache(_Config(takes=False), EngineOptions(timing_cache=tmp_path / "cache"))
    assert (tmp_path / "cache").read_bytes() == b"of another"


def test_a_timing_cache_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="the timing cache is a file"):
        check_options(library("tensorrt"), EngineOptions(sms=("89",), timing_cache=tmp_path), "89")


def test_the_budget_for_weights_is_for_engines(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", str(tiny_bundle), "Hello", "--weight-budget", "4"])
    assert "weights cannot wait in host memory" in capsys.readouterr().err
