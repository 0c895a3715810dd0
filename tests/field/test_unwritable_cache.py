"""A user whose cache and data directories cannot be written to: everything works, and no file is hashed twice by one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_export import build
from qwen_export.commands.cli import main
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.backends import integrity
from qwen_export.runtimes.backends.tensorrt.kernel_cache import KernelFile


@pytest.fixture(params=["a file", "under a file"])
def unwritable(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Directories that cannot be made, not even by root."""
    file = tmp_path / "no directory"
    file.write_text("kept")
    place = file if request.param == "a file" else file / "more"
    for variable in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "LOCALAPPDATA", "APPDATA"):
        monkeypatch.setenv(variable, str(place))
    monkeypatch.delenv("QWEN_EXPORT_KERNEL_CACHE", raising=False)
    integrity.forget()
    yield place
    integrity.forget()
    assert file.read_text() == "kept"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file of a bundle is hashed."""
    counts: Counter[str] = Counter()
    real: Callable[..., Any] = integrity.check_hash

    def counted(bundle: Path, name: str, *more: Any) -> Any:
        counts[name] += 1
        return real(bundle, name, *more)

    monkeypatch.setattr(integrity, "check_hash", counted)
    return counts


@pytest.mark.usefixtures("unwritable")
def test_a_bundle_runs_and_is_hashed_once(tiny_bundle: Path, hashed: Counter[str]) -> None:
    texts = []
    for _ in range(2):
        answer = load(tiny_bundle, threads=1).complete("Hello", sampling=SamplingParams(greedy=True), max_new_tokens=3)
        texts.append("".join(answer))
    assert texts[0] == texts[1]
    assert hashed == Counter(load_manifest(tiny_bundle).files.keys())


@pytest.mark.usefixtures("unwritable")
def test_check_and_run_work(tiny_bundle: Path, hashed: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(tiny_bundle)])
    main(["run", str(tiny_bundle), "Hello", "--greedy", "--max-new-tokens", "2"])
    assert "Traceback" not in capsys.readouterr().err
    assert set(hashed) == set(load_manifest(tiny_bundle).files)


@pytest.mark.usefixtures("unwritable")
def test_a_build_works(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert load_manifest(build(tiny_checkpoint, tmp_path / "bundle", max_context=64, mtp=False)).files


@pytest.mark.usefixtures("unwritable")
def test_kernels_are_compiled_again_by_the_next_process() -> None:
    kernels = KernelFile("engine", ("1.5", "GPU"))
    kernels.write(b"kernels")
    assert kernels.read() == b"" == KernelFile("engine", ("1.5", "GPU")).read()
