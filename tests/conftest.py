"""What many tests share: one tiny checkpoint and one bundle built from it per session."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# As many workers as cores: a second thread of torch in each would only wait. Read when torch is loaded, here and in processes of tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from qwen_export.building.compiler import build
from qwen_export.plugins.native.native_library import LIBRARIES
from qwen_export.runtimes.memory import cuda_driver
from tests.support.fake_driver import FakeDriver
from tests.support.family import tiny_config
from tests.support.fast_tests import FAST
from tests.support.one_thread import OneThread
from tests.support.shared_captures import share_captures
from tests.support.synthesize import synthesize
from tests.support.tiny_tokenizer import write_tiny_tokenizer
from tests.support.traced_command import TRACES

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="session", autouse=True)
def _quiet_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Notes of the runtime stay out of the user's directories."""
    folders = {"XDG_CACHE_HOME": "cache", "XDG_DATA_HOME": "data"}
    with pytest.MonkeyPatch.context() as patch:
        for variable, name in folders.items():
            patch.setenv(variable, str(tmp_path_factory.mktemp(name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxruntime.SessionOptions", OneThread)
        yield


@pytest.fixture(scope="session", autouse=True)
def _shared_captures(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Builds of one architecture share their traces. `pytest --cache-clear` forgets those of earlier runs."""
    kept = pytestconfig.pluginmanager.hasplugin("cacheprovider")
    folder = pytestconfig.cache.mkdir("traces") if kept else tmp_path_factory.mktemp("traces")  # type: ignore[union-attr]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TRACES, str(folder))
        share_captures(patch.setattr, folder)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional checkpoint in two shards: text under model.language_model., vision and mtp beside it, tokenizer, chat template.

    Shared: copy it (`checkpoint_copy`) before changing anything."""
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = write_tiny_tokenizer(directory / "tokenizer")
    return synthesize(tiny_config(), directory / "checkpoint", shards=2, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `tiny_checkpoint` for the CPU in fp32. Shared: copy it (`bundle_copy`) before changing anything."""
    return build(tiny_checkpoint, tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The trained dense checkpoint of this repository."""
    return EXAMPLES / "demo-dense"


@pytest.fixture(scope="session")
def demo_moe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained mixture-of-experts checkpoint, in a folder that a test may look around in."""
    return Path(shutil.copytree(EXAMPLES / "demo-moe", tmp_path_factory.mktemp("moe") / "checkpoint"))


@pytest.fixture(scope="session")
def demo_bundle(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `demo_checkpoint` for the CPU in fp32. Shared: copy it (`demo_bundle_copy`) before changing anything."""
    return build(demo_checkpoint, tmp_path_factory.mktemp("bundles") / "demo")


@pytest.fixture
def demo_bundle_copy(demo_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of the demo checkpoint that the test may damage or write to."""
    return Path(shutil.copytree(demo_bundle, tmp_path / "demo"))


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that the test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write another tiny checkpoint; keyword arguments of `synthesize`, and `config=` for its configuration."""
    count = 0

    def make(config: dict[str, object] | None = None, **options: object) -> Path:
        nonlocal count
        count += 1
        return synthesize(config or tiny_config(), tmp_path / f"made-{count}", **options)  # type: ignore[arg-type]

    return make


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the expected files of tests/data/golden again")
    parser.addoption("--schedules", default="2", help="random schedules of an engine per bundle and kind of drafts")
    parser.addoption("--longest-prompt", default="200", help="tokens of their longest prompt")
    parser.addoption("--fast", action="store_true", help="run the tests of tests/support/fast_tests.py only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        root = Path(__file__).parent
        fast = [item for item in items if item.path.relative_to(root).as_posix() in FAST]
        config.hook.pytest_deselected(items=[item for item in items if item not in fast])
        items[:] = fast


def pytest_collection_finish() -> None:
    """The million objects of the modules are not looked through again for garbage: a quarter of the time of builds otherwise."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether expected texts are to be written anew."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture
def fake_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that builds for CUDA take for the plugin."""
    found = LIBRARIES["cuda"]
    path = tmp_path / found.file
    path.write_bytes(b"kernels")
    monkeypatch.setenv(found.variable, str(path))
    return path


@pytest.fixture
def wide_heads(tmp_path: Path) -> Path:
    """A tiny checkpoint with the DeltaNet heads of the family, which the CUDA kernel is made for."""
    return synthesize(tiny_config(vision=False, linear_key_head_dim=128, linear_value_head_dim=128), tmp_path / "wide")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """A driver with two GPUs, whose memory is that of the host."""
    gc.collect()
    usual = gc.get_threshold()
    gc.set_threshold(700, 10, 10)  # as in a program: memory of a model that is gone comes back soon
    fake = FakeDriver(devices=2)
    cuda_driver.forget_driver()
    monkeypatch.setattr(cuda_driver, "load_driver", lambda: fake)
    yield fake
    gc.collect()
    gc.set_threshold(*usual)
    cuda_driver.forget_driver()


@pytest.fixture(scope="session")
def dense_q8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense demo as a GGUF file. Shared: copy it before changing anything."""
    from gguf.constants import GGMLQuantizationType

    from tests.support.gguf_files import DENSE, written

    return written(DENSE, tmp_path_factory.mktemp("gguf") / "demo-dense-Q8_0.gguf", GGMLQuantizationType.Q8_0)
