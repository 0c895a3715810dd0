"""The environment that the README tells people to install: the runtime extras only. Every command works there, or names what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from qwen_export.bundles.shipped_modules import shipped_modules
from qwen_export.commands.cli import COMMANDS
from qwen_export.extras import EXTRAS

ROOT = Path(__file__).parents[2]
ABSENT = [module for extra, modules in EXTRAS.items() if extra != "onnxruntime" for module in modules] + ["transformers", "pytest"]
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose sitecustomize hides the packages that a runtime installation does not have."""
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "sitecustomize.py").write_text(f"ABSENT = {ABSENT!r}\n{BLOCK}")
    return folder


def command(blocked: Path, *arguments: str | Path, code: int = 0, **variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"} | variables
    words = [sys.executable, "-m", "qwen_export", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stdout + done.stderr


def test_help_and_completion(blocked: Path) -> None:
    text = command(blocked, "--help")
    for name in COMMANDS:
        assert name in text
        assert "Usage" in command(blocked, name, "--help")
    assert "--prompt-file" in command(blocked, _QWEN_EXPORT_COMPLETE="bash_complete", COMP_WORDS="qwen-export run --prompt", COMP_CWORD="2")


def test_what_is_done_with_bundles_works(blocked: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    assert "This is a bundle" in command(blocked, "inspect", tiny_bundle)
    assert "runnable   yes" in command(blocked, "check", tiny_bundle)
    assert "2 new tokens" in command(blocked, "run", tiny_bundle, "Licensed", "--max-new-tokens", "2", "--greedy")
    assert "decode" in command(blocked, "bench", tiny_bundle, "--prompt-tokens", "8", "--new-tokens", "2")
    assert "MiB" in command(blocked, "package", tiny_bundle, "-o", tmp_path / "copy")


def test_what_needs_more_names_the_extra(blocked: Path, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    for arguments, extra in (
        (("inspect", tiny_checkpoint), "export"),
        (("build", tiny_checkpoint, "-o", tmp_path / "bundle"), "export"),
        (("verify", tiny_bundle, "--reference", tiny_checkpoint), "export"),
        (("verify", tiny_bundle, "--reference", tiny_checkpoint, "--per-layer"), "export"),
        (("bench", tiny_bundle, "--plot", "x.png"), "plot"),
        (("check", tiny_bundle, "--key", "key.pem"), "sign"),
    ):
        text = command(blocked, *arguments, code=1)
        assert f"needs the extra `{extra}`" in text and f"pip install '.[{extra}]'" in text


def test_the_api_names_the_extra(blocked: Path) -> None:
    code = "import qwen_export\ntry:\n    qwen_export.build\nexcept qwen_export.errors.QwenExportError as error:\n    print(error)"
    environment = os.environ | {"PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", f"import qwen_export.errors\n{code}"], capture_output=True, text=True, env=environment, check=True
    )
    assert "qwen_export.build needs the extra `export`" in done.stdout


def test_every_module_of_a_windows_package_can_be_imported(blocked: Path, tmp_path: Path) -> None:
    """In a folder that holds these modules only, with the packages of a runtime installation."""
    modules = shipped_modules()
    for name, path in modules.items():
        inside = name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        target = tmp_path / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    names = [name for name in modules if not name.endswith("__main__")]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)\nimport qwen_export, sys\nprint(qwen_export.__file__)"
    environment = os.environ | {"PYTHONPATH": f"{blocked}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0 and done.stdout.startswith(str(tmp_path)), done.stderr
    assert not [name for name in modules if name.startswith(("qwen_export.graphs", "qwen_export.plugins"))]
    assert "qwen_export.runtimes.decoding.decoder" in modules and "qwen_export.commands.run" in modules


@pytest.mark.runtime_only
@pytest.mark.slow
def test_a_real_environment_with_the_runtime_extras(tiny_bundle: Path, tmp_path: Path) -> None:
    """As the README says: pip install of the project with one backend."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{ROOT}[onnxruntime]"], check=True, cwd=tmp_path)
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        words = [str(python), "-m", "qwen_export", *arguments]
        return subprocess.run(words, check=True, capture_output=True, text=True, cwd=tmp_path, env=outside).stdout

    for name in COMMANDS:
        assert "Usage" in run(name, "--help")
    report = json.loads(run("check", str(tiny_bundle), "--json"))
    assert report["runnable"]
    assert run("run", str(tiny_bundle), "Licensed", "--max-new-tokens", "2", "--greedy")
    listed = json.loads(
        subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True).stdout
    )
    assert not {"torch", "onnx", "ml_dtypes", "ml-dtypes", "safetensors"} & {package["name"].lower() for package in listed}
