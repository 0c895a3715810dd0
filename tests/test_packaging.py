"""What is installed, and what importing it costs: the packages, the wheel, and the line between the runtime and the compiler."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_export.extras import EXTRAS
from qwen_export.graphs.config import parse_config
from tests.support.built_packages import PROJECT, copied_tree, packaged
from tests.support.family import tiny_config
from tests.support.source_tree import ROOT, TREES, module_name, parsed, sources

HEAVY = ("torch", "onnx", "transformers", "onnx_ir", "onnxscript", "safetensors")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module or ""


def in_fresh_python(code: str, *arguments: str) -> Any:
    """Run `code` outside of the checkout and return the JSON that it prints last."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_listed_packages_are_those_of_the_tree() -> None:
    folders = {path.parent for path in sources(*TREES)}
    assert all((folder / "__init__.py").exists() for folder in folders), "a folder without __init__.py would not be packaged"
    in_tree = {module_name(folder / "__init__.py") for folder in folders}
    listed = project()["tool"]["setuptools"]["packages"]
    assert len(set(listed)) == len(listed)
    assert set(listed) == in_tree


def test_versions_agree() -> None:
    import qwen_export

    assert project()["project"]["version"] == qwen_export.__version__


def test_no_bare_import_of_a_top_level_folder() -> None:
    """`import graphs` would work in a checkout and load a second copy of every class."""
    for path in sources(*TREES, "tests", "examples", "benchmarks"):
        assert not [name for name in imports(path) if name.split(".")[0] in ("graphs", "plugins", "runtimes")], path


NATIVE = {".cc", ".h", ".cu", ".cuh", ".sh"}


def native_sources() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "plugins" / "native").rglob("*") if path.suffix in NATIVE}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copied_tree(tmp_path / "source")


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


def expected_wheel() -> set[str]:
    modules = {module_name(path).replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py") for path in sources(*TREES)}
    page = {f"qwen_export/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "runtimes" / "server" / "page").iterdir()}
    folders = {"bundles": "run.ps1", "plugins/directml": "operators.json", "building/calibration": "calibration.txt"}
    data = {"qwen_export/py.typed", *(f"qwen_export/{folder}/{name}" for folder, name in folders.items())}
    return modules | data | page | {f"qwen_export/{p}" for p in native_sources()}


def test_the_wheel_holds_the_packages_and_nothing_else(tree: Path) -> None:
    wheel = packaged(tree, "wheel")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel_names(wheel) == expected_wheel()
    with zipfile.ZipFile(wheel) as file:
        metadata = next(file.read(name).decode() for name in file.namelist() if name.endswith("/METADATA"))
        entries = next(file.read(name).decode() for name in file.namelist() if name.endswith("/entry_points.txt"))
    assert "qwen-export = qwen_export.commands.cli:main" in entries
    required = {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line}
    names = {requirement.split(">")[0] for requirement in required}
    assert names == {
        "numpy",
        "tokenizers",
        "jinja2",
        "click",
        "rich",
        "psutil",
        "platformdirs",
    }


def test_a_wheel_with_a_library_is_for_one_platform(tree: Path) -> None:
    (tree / "plugins" / "native" / "libqwen_export_cpu.so").write_bytes(b"compiled")
    wheel = packaged(tree, "wheel")
    python, abi, platform = wheel.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none")
    assert platform == sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert "qwen_export/plugins/native/libqwen_export_cpu.so" in wheel_names(wheel)


def test_the_sdist_holds_all_sources_and_no_library(tree: Path, tmp_path: Path) -> None:
    """A wheel made from it is the one made from the checkout."""
    (tree / "plugins" / "native" / "libqwen_export_cpu.so").write_bytes(b"compiled")
    with tarfile.open(packaged(tree, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    modules = {path.relative_to(ROOT).as_posix() for path in sources(*TREES)}
    assert modules | native_sources() | set(PROJECT) <= names
    assert not {name for name in names if name.endswith((".so", ".ptx"))}
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert wheel_names(packaged(unpacked, "wheel")) == expected_wheel()


def test_messages_name_scripts_that_the_package_has() -> None:
    from qwen_export.plugins.native.native_library import PTX_SCRIPT, build_script

    for script in (build_script("cpu"), build_script("cuda"), PTX_SCRIPT):
        assert script.is_file()
        assert script.resolve().relative_to(ROOT).as_posix() in native_sources()


# The line between the runtime and the compiler

# PIL and av when a picture or video is decoded, and not before.
ALLOWED = {"numpy", "tokenizers", "jinja2", "onnxruntime", "openvino", "psutil", "platformdirs", "PIL", "av"}
ROOMS = {"server": {*EXTRAS["serve"], *ALLOWED}, "structured": {"llguidance", *ALLOWED}}
"""What rooms of an extra may import besides, when they are used."""
GROUND = ("bundle_contract", "version", "errors", "long_paths", "manifest", "manifest_types", "element_types", "extras", "stages")


@pytest.mark.parametrize("path", sources("runtimes"), ids=lambda path: path.stem)
def test_the_runtime_imports_nothing_of_the_compiler(path: Path) -> None:
    for name in imports(path):
        top = name.split(".")[0]
        if top == "qwen_export":
            assert name.removeprefix("qwen_export.") in GROUND or name.startswith("qwen_export.runtimes"), name
        else:
            assert top in ROOMS.get(path.parent.name, ALLOWED) or top in sys.stdlib_module_names, name


def test_ground_modules_need_the_standard_library_only() -> None:
    """They import each other, and nothing else of the project; loading them loads no package."""
    ground = {path.stem for path in (ROOT / "qwen_export").glob("*.py")} - {"__main__", "__init__"}
    for name in ground:
        for imported in imports(ROOT / "qwen_export" / f"{name}.py"):
            top, _, rest = imported.partition(".")
            assert top != "qwen_export" or not rest or rest in ground, (name, imported)
    names = sorted(f"qwen_export.{name}" for name in ground)
    loaded = in_fresh_python(f"import importlib, json, sys\nfor name in {names!r}: importlib.import_module(name)\n{_LOADED}")
    bare = in_fresh_python(f"import json, sys; {_LOADED}")
    assert set(loaded) - set(bare) - {"qwen_export"} <= set(sys.stdlib_module_names)


def test_only_the_session_modules_know_onnxruntime() -> None:
    users = {path.stem for path in sources("runtimes") if "onnxruntime" in {name.split(".")[0] for name in imports(path)}}
    assert users <= {"onnxruntime_session", "onnxruntime_kernels", "onnxruntime_library", "load_plugins", "directml_buffer"}


_LOADED = "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"


def test_importing_the_package_loads_the_standard_library_only() -> None:
    code = f"import json, sys; before = set(sys.modules); import qwen_export, qwen_export.runtimes, qwen_export.manifest; {_LOADED}"
    bare = in_fresh_python(f"import json, sys; {_LOADED}")
    new = set(in_fresh_python(code)) - set(bare) - {"qwen_export"}
    assert new <= set(sys.stdlib_module_names)


def test_running_a_bundle_loads_neither_torch_nor_onnx(tiny_bundle: Path) -> None:
    code = f"""
import json, sys
from qwen_export.runtimes import SamplingParams, load
model = load(sys.argv[1])
answer = model.stream([{{"role": "user", "content": "Hello"}}], sampling=SamplingParams(greedy=True), max_new_tokens=4)
"".join(answer)
assert len(answer.tokens) >= 1
{_LOADED}
"""
    loaded = set(in_fresh_python(code, str(tiny_bundle)))
    assert {"onnxruntime", "tokenizers", "jinja2"} <= loaded
    assert not loaded & set(HEAVY)


def test_run_and_check_load_neither_torch_nor_onnx(tiny_bundle: Path) -> None:
    code = f"import json, sys; from qwen_export.commands.cli import main; main(sys.argv[1:]); {_LOADED}"
    for arguments in (["check", str(tiny_bundle)], ["run", str(tiny_bundle), "Hello", "--max-new-tokens", "2"]):
        assert not set(in_fresh_python(code, *arguments)) & set(HEAVY)


# What `inspect` needs must answer at once

CHECKPOINT = [f"graphs.checkpoint.{name}" for name in ("checkpoint_directory", "tensor_names", "safetensors_header")]
EARLY = ["graphs.config", *CHECKPOINT, "building.build_plan", "bundles.inspection"]


@pytest.mark.parametrize("name", EARLY)
def test_planning_loads_neither_torch_nor_onnx(name: str) -> None:
    assert not set(in_fresh_python(f"import json, sys; import qwen_export.{name}; {_LOADED}")) & set(HEAVY)


def test_inspect_loads_little(tiny_checkpoint: Path) -> None:
    """It answers at once: what it imports is what it takes."""
    code = f"import json, sys; from qwen_export.commands.cli import main; main(sys.argv[1:]); {_LOADED}"
    loaded = set(in_fresh_python(code, "inspect", str(tiny_checkpoint)))
    assert not loaded & {*HEAVY, "matplotlib", "scipy", "polygraphy", "tokenizers", "jinja2"}


def test_the_build_function_is_importable_from_the_package() -> None:
    """Again and again: a module of the same name would take its place once it is loaded."""
    code = """
import json
from qwen_export import build as first
import qwen_export.commands.build
from qwen_export import build as second
import qwen_export
print(json.dumps([callable(first), callable(second), first is second, callable(qwen_export.build)]))
"""
    assert in_fresh_python(code) == [True, True, True, True]


def test_recorded_kernels_are_those_of_the_installed_release() -> None:
    """What is recorded for builds that cannot be asked must not promise more than the registry of the same release."""
    from qwen_export.plugins.onnxruntime.onnxruntime_choices import CHOICES, OPTIONAL, VISION_CHOICES, choose, choose_vision
    from qwen_export.plugins.onnxruntime.recorded_kernels import recorded
    from qwen_export.runtimes.backends.onnxruntime.onnxruntime_kernels import installed

    real = installed("cpu")
    assert real is not None
    config = parse_config(tiny_config()).text
    for precision in ("fp32", "fp16", "bf16"):
        assert choose(recorded("cpu"), precision, config)[0].keys() == choose(real, precision, config)[0].keys(), precision
        assert choose_vision(recorded("cpu"), precision)[0].keys() == choose_vision(real, precision)[0].keys(), precision
    assert choose(recorded("cpu"), "fp32", config)[0].keys() == CHOICES["cpu"].keys() - {"moe", *OPTIONAL}
    assert choose_vision(recorded("cpu"), "fp32")[0].keys() == VISION_CHOICES["cpu"].keys()
