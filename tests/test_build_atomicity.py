"""A bundle appears whole or not at all: failures, interrupts, full disks, and what already lies at the output path."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen_export.building.compiler import build
from qwen_export.building.staging import staged_directory
from qwen_export.errors import BuildError, CheckpointError, QwenExportError
from qwen_export.graphs.weights import hashed_file
from qwen_export.manifest import DIGEST, MANIFEST, load_manifest
from qwen_export.manifest_parsing import decode, parse
from qwen_export.runtimes import load
from qwen_export.runtimes.backends.integrity import ensure_whole
from tests.support.family import tiny_config
from tests.support.safetensors_files import overwrite_tensor
from tests.support.synthesize import synthesize
from tests.support.weights_only import weights_only

LAST = "model.language_model.layers.3.mlp.down_proj.weight"


def contents(directory: Path) -> list[str]:
    """Names in a directory, hidden ones too."""
    return sorted(os.listdir(directory))


def bundle_bytes(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


@pytest.fixture
def capture_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds get a graph that has nothing but the weights; capturing the real one takes two seconds."""
    monkeypatch.setattr("qwen_export.building.lower_graphs.lower", weights_only)


# Failures on the way


@pytest.mark.usefixtures("capture_skipped")
def test_a_damaged_tensor_late_in_the_stream(checkpoint_copy: Path, out: Path) -> None:
    overwrite_tensor(checkpoint_copy, LAST, b"\xff\x7f" * 4, at=64)
    with pytest.raises(CheckpointError, match=rf"not finite.*{LAST}"):
        build(checkpoint_copy, out / "bundle")
    assert contents(out) == []


@pytest.mark.usefixtures("capture_skipped")
def test_a_failure_keeps_the_bundle_that_was_there(checkpoint_copy: Path, tiny_bundle: Path, out: Path) -> None:
    shutil.copytree(tiny_bundle, out / "bundle")
    before = bundle_bytes(out / "bundle")
    overwrite_tensor(checkpoint_copy, LAST, b"\xff\x7f" * 4, at=64)
    with pytest.raises(CheckpointError):
        build(checkpoint_copy, out / "bundle", force=True)
    assert contents(out) == ["bundle"] and bundle_bytes(out / "bundle") == before


@pytest.mark.usefixtures("capture_skipped")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_while_weights_are_written(tiny_checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real, written = hashed_file.write_all, 0

    def filling(write: Callable[[memoryview], int | None], data: memoryview) -> None:
        nonlocal written
        written += data.nbytes
        if written > 300_000:
            raise OSError(code, os.strerror(code))
        real(write, data)

    monkeypatch.setattr(hashed_file, "write_all", filling)
    with pytest.raises(BuildError, match=r"disk is full.*Free space"):
        build(tiny_checkpoint, out / "bundle")
    assert contents(out) == []


def test_another_failure_of_the_file_system(out: Path) -> None:
    with pytest.raises(BuildError, match=r"no bundle was written.*x\.onnx.*Input/output error"), staged_directory(out / "bundle"):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "x.onnx")
    assert contents(out) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting needs root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, b"size=512k") != 0:
        pytest.skip(f"cannot mount: {os.strerror(ctypes.get_errno())}")
    yield disk
    libc.umount(str(disk).encode())


@pytest.mark.usefixtures("capture_skipped")
def test_a_disk_that_really_is_full(tiny_checkpoint: Path, small_disk: Path) -> None:
    with pytest.raises(BuildError, match="disk is full"):
        build(tiny_checkpoint, small_disk / "bundle")
    assert contents(small_disk) == []


# What lies at the output path


def test_an_existing_output_is_refused_without_force(tiny_checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_export.building.lower_graphs.lower", lambda *arguments: pytest.fail("the build began its work"))
    (out / "empty").mkdir()
    (out / "file").write_text("mine")
    (out / "dangling").symlink_to("nowhere")
    for name in ("empty", "file", "dangling"):
        with pytest.raises(BuildError, match=r"exists already.*or force to replace"):
            build(tiny_checkpoint, out / name)
    assert contents(out) == ["dangling", "empty", "file"] and (out / "file").read_text() == "mine"


def test_force_replaces_a_bundle(tiny_checkpoint: Path, tiny_bundle: Path, out: Path) -> None:
    shutil.copytree(tiny_bundle, out / "bundle")
    (out / "bundle" / "decoder.onnx").write_bytes(b"damaged")
    build(tiny_checkpoint, out / "bundle", force=True)
    assert contents(out) == ["bundle"]
    load(out / "bundle")


def test_force_never_deletes_what_is_not_a_bundle(tiny_checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_export.building.lower_graphs.lower", lambda *arguments: pytest.fail("the build began its work"))
    (out / "thesis").mkdir()
    (out / "thesis" / "chapter.tex").write_text("years of work")
    (out / "file").write_text("mine")
    for name in ("thesis", "file"):
        with pytest.raises(BuildError, match="not a bundle"):
            build(tiny_checkpoint, out / name, force=True)
    assert (out / "thesis" / "chapter.tex").read_text() == "years of work" and (out / "file").read_text() == "mine"
    assert contents(out) == ["file", "thesis"]


def test_force_takes_an_empty_directory_and_the_current_one(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "empty").mkdir()
    with staged_directory(out / "empty", replace=True) as staging:
        (staging / MANIFEST).write_text("{}")
    assert contents(out) == ["empty"] and contents(out / "empty") == [MANIFEST]
    monkeypatch.chdir(out)
    with staged_directory(Path("new/deeper"), replace=True) as staging:
        (staging / "x").write_text("")
    assert contents(out / "new" / "deeper") == ["x"]


def test_force_on_a_link_replaces_the_link(out: Path) -> None:
    (out / "real").mkdir()
    (out / "real" / MANIFEST).write_text("old")
    (out / "link").symlink_to("real")
    with staged_directory(out / "link", replace=True) as staging:
        (staging / MANIFEST).write_text("new")
    assert (out / "real" / MANIFEST).read_text() == "old" and (out / "link" / MANIFEST).read_text() == "new"
    assert contents(out) == ["link", "real"]


def test_the_old_bundle_comes_back_when_the_swap_fails(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "bundle").mkdir()
    (out / "bundle" / MANIFEST).write_text("old")
    real, calls = os.rename, 0

    def failing(source: str | Path, target: str | Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr("qwen_export.building.staging.os.rename", failing)
    with pytest.raises(KeyboardInterrupt), staged_directory(out / "bundle", replace=True) as staging:
        (staging / MANIFEST).write_text("new")
    assert contents(out) == ["bundle"] and (out / "bundle" / MANIFEST).read_text() == "old"


def test_a_bundle_that_somebody_else_finished_first_is_kept(out: Path) -> None:
    with pytest.raises(BuildError, match="exists already"), staged_directory(out / "bundle") as staging:
        (staging / MANIFEST).write_text("mine")
        (out / "bundle").mkdir()
        (out / "bundle" / MANIFEST).write_text("theirs")
    assert contents(out) == ["bundle"] and (out / "bundle" / MANIFEST).read_text() == "theirs"


def test_an_output_below_a_file(out: Path) -> None:
    (out / "file").write_text("")
    with pytest.raises(BuildError, match=r"no bundle was written.*out/file"), staged_directory(out / "file" / "bundle"):
        pytest.fail("there is no such directory")


# Signals

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def slow_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last tensor alone is more than is kept in memory before it is written."""
    return synthesize(tiny_config(vocab_size=100_000, vision=False), tmp_path_factory.mktemp("slow") / "checkpoint", with_mtp=False)


def start_build(checkpoint: Path, bundle: Path, *module: str) -> subprocess.Popen[str]:
    """A process that SIGINT reaches even where the tests run in the background of a shell, which has it ignored."""
    command = [sys.executable, "-m", *module, "build", str(checkpoint), "-o", str(bundle)]
    ignored = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    finally:
        signal.signal(signal.SIGINT, ignored)


BEFORE_A_TENSOR = ("tests.support.weights_only", "before")
AFTER_A_TENSOR = ("tests.support.weights_only", "after")


def wait_for(directory: Path, pattern: str, process: subprocess.Popen[str]) -> Path:
    for _ in range(24_000):
        found = list(directory.glob(pattern))
        if found:
            return found[0]
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError(f"no {pattern} after two minutes")


@pytest.mark.parametrize(
    ("number", "stage"),
    [
        (signal.SIGINT, "capturing"),
        (signal.SIGINT, "writing"),
        (signal.SIGTERM, "writing"),
        pytest.param(signal.SIGTERM, "capturing", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_interrupted_build_leaves_nothing(slow_checkpoint: Path, out: Path, number: signal.Signals, stage: str) -> None:
    process = start_build(slow_checkpoint, out / "bundle", *(BEFORE_A_TENSOR if stage == "writing" else ("qwen_export",)))
    wait_for(out, ".bundle.partial/bundle" + ("/model.weights" if stage == "writing" else ""), process)
    time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in errors and errors.splitlines()[-1] == "interrupted"
    assert contents(out) == []


def test_a_killed_build_leaves_nothing_that_runs(slow_checkpoint: Path, out: Path) -> None:
    process = start_build(slow_checkpoint, out / "bundle", *BEFORE_A_TENSOR)
    wait_for(out, ".bundle.partial/bundle/model.weights", process)
    process.kill()
    process.communicate(timeout=240)
    assert not (out / "bundle").exists()
    for left in out.iterdir():
        with pytest.raises(QwenExportError):
            load(left)


def interrupt_after_a_tensor(checkpoint: Path, bundle: Path, number: signal.Signals) -> None:
    """Start a build and stop it when at least one tensor is finished and the last is not."""
    process = start_build(checkpoint, bundle, *AFTER_A_TENSOR)
    journal = wait_for(bundle.parent, ".bundle.partial/journal", process)
    while not journal.read_text().count("\n"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=240)
    assert not bundle.exists() and (bundle.parent / ".bundle.partial" / "bundle" / "model.weights").exists()


@pytest.mark.usefixtures("capture_skipped")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=str)
def test_a_resumed_bundle_is_the_same_to_the_byte(slow_checkpoint: Path, out: Path, number: signal.Signals) -> None:
    """Finished tensors are not read again, and what comes out cannot be told from an uninterrupted build."""
    expected = bundle_bytes(build(slow_checkpoint, out / "whole"))
    interrupt_after_a_tensor(slow_checkpoint, out / "bundle", number)
    with pytest.raises(QwenExportError):
        load(out / ".bundle.partial" / "bundle")
    seen: set[str] = set()
    build(slow_checkpoint, out / "bundle", report=lambda name, done, total: seen.add(name))
    assert "checking finished tensors" in seen and "embed_tokens.weight" not in seen
    assert bundle_bytes(out / "bundle") == expected
    assert contents(out) == ["bundle", "whole"]


@pytest.mark.usefixtures("capture_skipped")
@pytest.mark.parametrize("change", ["checkpoint", "damage"])
def test_what_does_not_fit_is_made_again(slow_checkpoint: Path, out: Path, tmp_path: Path, change: str) -> None:
    checkpoint = Path(shutil.copytree(slow_checkpoint, tmp_path / "checkpoint"))
    interrupt_after_a_tensor(checkpoint, out / "bundle", signal.SIGKILL)
    if change == "checkpoint":
        for path in checkpoint.glob("*.safetensors"):
            os.utime(path)
    else:
        with (out / ".bundle.partial" / "bundle" / "model.weights").open("r+b") as file:
            file.seek(1000)
            file.write(b"damage")
    seen: set[str] = set()
    build(checkpoint, out / "bundle", report=lambda name, done, total: seen.add(name))
    assert "embed_tokens.weight" in seen
    # The graphs of this test are none that a runtime would take: only the files are looked at.
    ensure_whole(out / "bundle", parse(decode((out / "bundle" / MANIFEST).read_bytes())), again=True)
    assert bundle_bytes(out / "bundle") == bundle_bytes(build(checkpoint, out / "whole"))


def test_two_builds_at_once_do_not_share(slow_checkpoint: Path, out: Path) -> None:
    """The second to come works elsewhere; the first to finish wins."""
    with staged_directory(out / "bundle") as first:
        with pytest.raises(RuntimeError), staged_directory(out / "bundle") as second:
            assert first != second
            raise RuntimeError
        (first / MANIFEST).write_text("first")
    assert contents(out) == ["bundle"]


@pytest.mark.usefixtures("capture_skipped")
def test_memory_that_is_too_small(tiny_checkpoint: Path, out: Path) -> None:
    with pytest.raises(BuildError, match=r"needs more memory than max_memory allows.*got 0\.1 GB.*at least"):
        build(tiny_checkpoint, out / "bundle", max_memory=100_000_000)
    assert contents(out) == []


def test_the_number_of_jobs_changes_nothing(tiny_checkpoint: Path, tiny_bundle: Path, out: Path) -> None:
    assert bundle_bytes(build(tiny_checkpoint, out / "bundle", jobs=5)) == bundle_bytes(tiny_bundle)


def test_the_manifest_is_written_last(tiny_checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the moment of a kill: a directory with a manifest has everything else."""
    seen: list[list[str]] = []
    real = os.replace

    def watched(source: Path, destination: Path) -> None:
        if Path(destination).name == MANIFEST:
            seen.append([name for name in contents(Path(destination).parent) if not name.startswith(".")])
        real(source, destination)

    monkeypatch.setattr(os, "replace", watched)
    manifest = load_manifest(build(tiny_checkpoint, out / "bundle"))
    assert seen == [sorted([*manifest.files, DIGEST])]
    ensure_whole(out / "bundle", manifest)
