"""Checkpoints by their ids, from a stand-in of the hub's HTTP API on this machine. No test reaches a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gguf.constants import GGMLQuantizationType as Kind

from qwen_export.downloads.hub_options import HubName, HubOptions, hub_name
from qwen_export.downloads.local_checkpoint import local_checkpoint
from qwen_export.downloads.needed_files import weights
from qwen_export.errors import CheckpointError, ParameterError
from tests.support.family import tiny_config
from tests.support.gguf_files import matrices, write_gguf
from tests.support.hub_server import COMMIT, Hub, hub_server
from tests.support.source_tree import ROOT
from tests.support.synthesize import synthesize
from tests.support.tiny_tokenizer import write_tiny_tokenizer

TOKEN = "hf_secret"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    tokenizer = write_tiny_tokenizer(root / "tokenizer")
    model = synthesize(tiny_config(vision=False), root / "model", shards=2, tokenizer=tokenizer)
    for name in ("README.md", "figure.png", "pytorch_model.bin", "onnx/model.onnx", "original/consolidated.safetensors"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"not needed")
    ggufs = root / "gguf"
    ggufs.mkdir()
    for kind in (Kind.F16, Kind.Q8_0):
        write_gguf(model, ggufs / f"tiny-{kind.name}.gguf", matrices(kind))
    (ggufs / "mmproj-F16.gguf").write_bytes(b"GGUF")
    empty = root / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("nothing")
    names = {"owner/tiny": model, "owner/private": model, "owner/tiny-GGUF": ggufs, "owner/empty": empty}
    with hub_server(names, {"owner/private"}, TOKEN) as server:
        yield server


def command(hub: Hub, home: Path, *arguments: str, module: str = "qwen_export", **environment: str) -> subprocess.CompletedProcess[str]:
    """`qwen-export` with the stand-in as its hub and a cache of its own."""
    names = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", **environment}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))}
    process = [sys.executable, "-m", module, *arguments]
    return subprocess.run(process, env=kept | names, capture_output=True, text=True, cwd=home.parent, timeout=120)


def test_a_build_downloads_what_it_reads(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    arguments = ("build", "owner/tiny", "-o", str(tmp_path / "bundle"), "--max-context", "64", "--no-mtp")
    done = command(hub, tmp_path / "home", *arguments, module="tests.support.traced_command")
    assert done.returncode == 0, done.stderr
    assert "verify" in done.stderr and "--reference owner/tiny" in done.stderr
    asked = {path.rpartition("/")[2] for method, path, _ in hub.asked if "/resolve/" in path}
    shards = {path.name for path in hub.repositories["owner/tiny"].glob("*.safetensors")}
    assert len(shards) == 2 and {"config.json", "tokenizer.json", *shards} <= asked
    assert not asked & {"README.md", "figure.png", "pytorch_model.bin", "model.onnx", "consolidated.safetensors"}
    hub.asked.clear()
    gone = command(hub, tmp_path / "home", "inspect", "owner/tiny", "--offline", "--target", "onnxruntime")
    assert gone.returncode == 0 and not hub.asked, gone.stderr


def test_inspect_downloads_headers_only(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    done = command(hub, tmp_path / "home", "inspect", "owner/tiny", "--json", "--target", "onnxruntime")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    local = command(hub, tmp_path / "home", "inspect", str(hub.repositories["owner/tiny"]), "--json", "--target", "onnxruntime")
    expected = json.loads(local.stdout)
    for key in ("model", "parts", "bytes", "files", "quantization", "targets"):
        assert report[key] == expected[key], key
    spans = [span for method, path, span in hub.asked if path.endswith(".safetensors") and method == "GET"]
    assert spans and all(span.startswith("bytes=") for span in spans)


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision(hub: Hub, tmp_path: Path, revision: str) -> None:
    hub.asked.clear()
    done = command(hub, tmp_path / "home", "inspect", "owner/tiny", "--revision", revision, "--target", "onnxruntime")
    assert done.returncode == 0, done.stderr
    assert any(revision in path for _, path, _ in hub.asked)


def test_a_private_model_needs_a_token(hub: Hub, tmp_path: Path) -> None:
    arguments = ("inspect", "owner/private", "--target", "onnxruntime")
    refused = command(hub, tmp_path / "home", *arguments)
    assert refused.returncode == 1 and "HF_TOKEN" in refused.stderr and "Traceback" not in refused.stderr
    assert command(hub, tmp_path / "home", *arguments, HF_TOKEN=TOKEN).returncode == 0


def test_gguf_models_by_a_part_of_their_names(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    done = command(hub, tmp_path / "home", "inspect", "owner/tiny-GGUF:q8_0", "--target", "onnxruntime")
    assert done.returncode == 0, done.stderr
    assert not any("F16" in path for _, path, _ in hub.asked)
    several = command(hub, tmp_path / "home", "inspect", "owner/tiny-GGUF")
    assert several.returncode == 1 and "tiny-F16.gguf, tiny-Q8_0.gguf" in several.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("owner/nothing",), "no such directory, and the hub has no such model"),
        (("owner/tiny", "--revision", "v9"), "no such revision"),
        (("owner/tiny", "--offline"), "the model is not in the cache"),
        (("owner/empty",), "no weights that are read"),
        (("owner/tiny-GGUF:Q2_K",), "no such GGUF model"),
    ],
    ids=["name", "revision", "offline", "no weights", "quantization"],
)
def test_messages(hub: Hub, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = command(hub, tmp_path / "home", "inspect", *arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    silent = Hub({}, set(), "")
    silent.address = "http://127.0.0.1:9"
    done = command(silent, tmp_path / "home", "build", "owner/tiny", "-o", str(tmp_path / "bundle"))
    assert done.returncode == 1
    assert "no such directory, and the model could not be downloaded" in done.stderr and "Traceback" not in done.stderr


def test_what_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_name("Qwen/Qwen3.5-0.8B") == HubName("Qwen/Qwen3.5-0.8B")
    assert hub_name(Path("owner/name-GGUF:Q4_K_M")) == HubName("owner/name-GGUF", "Q4_K_M")
    for path in ("model", "./owner/name", "/owner/name", "a/b/c", "../name", "owner/.name"):
        assert hub_name(path) is None, path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3.5-0.8B").mkdir(parents=True)
    assert hub_name("Qwen/Qwen3.5-0.8B") is None
    assert local_checkpoint("Qwen/Qwen3.5-0.8B") == Path("Qwen/Qwen3.5-0.8B")


def test_weights_that_are_needed() -> None:
    """As `weight_files` reads a directory."""
    shards = ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"]
    beside = ["extra.safetensors", "model-mtp.safetensors", "sub/x.safetensors"]
    assert weights([*shards, *beside], shards) == [*shards, "model-mtp.safetensors"]
    assert weights(["model.safetensors", *shards], shards) == ["model.safetensors"]
    assert weights(["model.safetensors", *shards], ["model.safetensors", *shards]) == ["model.safetensors", *shards]
    assert weights(shards, []) == shards


class FakeModelScope(ModuleType):
    def __init__(self, directory: Path) -> None:
        super().__init__("modelscope")
        self.directory, self.calls = directory, list[dict[str, Any]]()

    def snapshot_download(self, model: str, **options: Any) -> str:
        self.calls.append({"model": model, **options})
        if model == "owner/nothing":
            raise ValueError("no such model")
        return str(self.directory)


def test_modelscope(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through its own package, whose call is recorded here."""
    directory = tmp_path / "cache"
    shutil.copytree(hub.repositories["owner/tiny"], directory)
    fake = FakeModelScope(directory)
    monkeypatch.setitem(sys.modules, "modelscope", fake)
    assert local_checkpoint("owner/tiny", HubOptions("modelscope", "v1")) == directory
    (call,) = fake.calls
    assert (call["model"], call["revision"], call["local_files_only"]) == ("owner/tiny", "v1", False)
    assert {"config.json", "tokenizer.json", "*.safetensors"} <= set(call["allow_patterns"])
    with pytest.raises(CheckpointError, match="ModelScope"):
        local_checkpoint("owner/nothing", HubOptions("modelscope"))
    with pytest.raises(ParameterError, match="no such hub"):
        local_checkpoint("owner/tiny", HubOptions("elsewhere"))
