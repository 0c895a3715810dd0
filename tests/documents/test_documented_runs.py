"""The commands of each page, executed from its first to its last, in a folder that holds what the page says its reader has."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.documented_commands import ROOT, DocumentedCommand, commands_of, pages, python_of, write_readers_files

pytestmark = pytest.mark.documents

LEFT_OUT = (
    (
        r"\b(pip|npm|make|apt|apt-get|git|scp|ssh|rsync|docker|podman|kubectl|systemctl|serve run|openssl)\b",
        "changes the machine, or needs another",
    ),
    (r"Qwen/|unsloth/|OWNER/", "needs a hub"),
    (r"--device cuda|--target tensorrt|bundles/(cuda|rtx)|\brebuild\b", "needs a GPU"),
    (r"benchmarks[./]|examples/|tests/|plugins/native|build/corpus|build/tok|build/vision|\$model|build/run|^for |^done", "takes minutes"),
    (r"--runtime openvino", "needs OpenVINO"),
    (r"--max-context 1010000", "needs a checkpoint with that context"),
    (r"\.gguf|--lora|gptq", "needs a file that others make"),
    (
        r"^(curl|eval|cd|export|\.|QWEN_EXPORT_\w+=)|127\.0\.0\.1|run\.ps1|serve\.py|--sign|--key",
        "belongs to a shell or a server that stays",
    ),
)
"""What is not run here, and why. The command line's part of each is still parsed (test_documented_commands.py)."""

SERVING = re.compile(r"^qwen-export serve ")
READY = "ready: "


def is_run(command: DocumentedCommand) -> bool:
    return not any(re.search(pattern, command.text) for pattern, _ in LEFT_OUT)


PAGES = [page for page in pages() if any(map(is_run, commands_of(page)))]
PYTHON_PAGES = [page for page in pages() if python_of(page) and "devices=[0, 1]" not in python_of(page)]


@pytest.fixture
def folder(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> Path:
    """A reader's folder: the checkpoint under its release's name, a bundle of it, pictures, texts and requests."""
    (tmp_path / "Qwen3.5-0.8B").symlink_to(tiny_checkpoint)
    (tmp_path / "bundles").mkdir()
    shutil.copytree(tiny_bundle, tmp_path / "bundles" / "qwen")
    write_readers_files(tmp_path)
    return tmp_path


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """`qwen-export` and `python` are those of the tests."""
    programs = tmp_path_factory.mktemp("bin")
    for name, line in (("qwen-export", f'"{sys.executable}" -m qwen_export'), ("python", f'"{sys.executable}"')):
        (programs / name).write_text(f'#!/bin/sh\nexec {line} "$@"\n')
        (programs / name).chmod(0o755)
    yield os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_work(page: Path, folder: Path, environment: dict[str, str]) -> None:
    commands = [command for command in commands_of(page) if is_run(command)]
    made = {words[words.index("-o") + 1] for command in commands for words in command.ours if "-o" in words}
    if "bundles/qwen" in made:
        shutil.rmtree(folder / "bundles" / "qwen")
    for command in commands:
        if SERVING.match(command.text):
            serve(command.text, folder, environment)
            continue
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command.text}"], cwd=folder, env=environment, input="hello\n", capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command.text}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"


def serve(line: str, folder: Path, environment: dict[str, str]) -> None:
    """Start the server on a free port, wait until it says that it is ready, and end it as an operator does."""
    line = re.sub(r"--port \d+", "", line.split("#")[0]) + " --port 0"
    with subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for text in process.stderr:
            said.append(text)
            if READY in text:
                process.send_signal(signal.SIGTERM)
                break
        said.append(process.stderr.read())
    assert process.returncode == 0 and any(READY in text for text in said), "".join(said)[-2000:]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_python_of_a_page_works(page: Path, folder: Path, environment: dict[str, str]) -> None:
    code = python_of(page)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{code}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
