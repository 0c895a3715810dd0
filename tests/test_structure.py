"""The rooms of the house: who may import whom, how long a file may be, and what a name means."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from qwen_export.targets import TARGETS
from tests.support.fast_tests import FAST
from tests.support.source_tree import ROOT, TREES, imported_modules, modules, parsed, sources, tracked_files

LONGEST = 400
SUFFIXES = (".py", ".cc", ".cu", ".cuh", ".h", ".sh")

# What each package may import of this repository, besides itself and the ground modules.
MAY_IMPORT = {
    "qwen_export.graphs": (),
    "qwen_export.plugins": ("qwen_export.graphs", "qwen_export.runtimes.backends"),
    "qwen_export.runtimes": (),
}

# Imports that the rules forbid, with the reason for each: at most two.
EXCEPTIONS: dict[tuple[str, str], str] = {}

# Modules that no other module imports: a process starts there, or they are imported by a name made at run time.
ENTRIES = re.compile(r"qwen_export\.(__main__|commands\.\w+)")

# Modules that callers of the Python API import by themselves.
PUBLIC = {"qwen_export.runtimes.text.tool_calls"}

# Private names of other libraries, which have no public one for the same.
FOREIGN = {"_attn_implementation", "_get_default_generation_params", "_dequantize_one", "_handle", "_obj"}

# Packages whose docstring goes on with an example, after the two lines.
WITH_EXAMPLE = ("qwen_export", "qwen_export.runtimes")


def package_of(name: str) -> str:
    """qwen_export.graphs of qwen_export.graphs.config; qwen_export of everything that is in no other package."""
    return next((package for package in MAY_IMPORT if within(name, package)), "qwen_export")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def ground() -> set[str]:
    """The modules that every package may import: the files of `qwen_export` itself."""
    return {f"qwen_export.{path.stem}" for path in (ROOT / "qwen_export").glob("*.py") if not path.stem.startswith("__")}


def passes() -> set[str]:
    """The modules of passes, which are imported by their names in the lists of targets."""
    steps = [step for target in TARGETS.values() for step in (*target.passes, *target.vision_passes)]
    return {f"qwen_export.{step.function.partition(':')[0]}" for step in steps}


def arrows() -> dict[str, set[str]]:
    return {name: {target for target in imported_modules(name) if (name, target) not in EXCEPTIONS} for name in modules()}


# Imports


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_is_below_it(package: str) -> None:
    allowed = (package, *MAY_IMPORT[package])
    wrong = [
        f"{name} imports {target}"
        for name, targets in arrows().items()
        if within(name, package)
        for target in sorted(targets)
        if target not in ground() and not any(within(target, other) for other in allowed)
    ]
    assert not wrong


def test_ground_modules_import_only_ground_modules() -> None:
    wrong = [f"{name} imports {target}" for name in sorted(ground()) for target in sorted(arrows()[name] - ground())]
    assert not wrong


def test_only_the_commands_import_the_server() -> None:
    """HTTP and its packages are loaded by `serve`, not with a bundle."""
    server = "qwen_export.runtimes.server"
    outside = {name for name in arrows() if not within(name, server) and not within(name, "qwen_export.commands")}
    assert not [name for name in outside if any(within(target, server) for target in arrows()[name])]


def test_no_circle_of_modules() -> None:
    try:
        TopologicalSorter(arrows()).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def test_exceptions_are_few_and_needed() -> None:
    assert len(EXCEPTIONS) <= 2
    unused = [pair for pair in EXCEPTIONS if pair[0] not in modules() or pair[1] not in imported_modules(pair[0])]
    assert not unused, "an exception that nothing needs: remove it"


def test_every_import_of_the_project_names_a_module() -> None:
    """What is imported in a function or under TYPE_CHECKING may be a module that is gone."""
    for name, path in modules().items():
        named = [node.module for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom) and node.module]
        assert not [module for module in named if within(module, "qwen_export") and module not in modules()], name


def test_the_packages_hold_no_support_of_tests_and_benchmarks() -> None:
    """A module that no other module imports is used by tests, or by no caller at all."""
    read = {target for targets in arrows().values() for target in targets} | passes() | PUBLIC
    unread = [name for name, path in modules().items() if name not in read and path.stem != "__init__" and not ENTRIES.fullmatch(name)]
    assert not unread


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_the_packages_import_nothing_that_is_not_installed(folder: str) -> None:
    for path in sources(*TREES):
        for node in ast.walk(parsed(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if within(name, folder)], path


# Files


def test_no_file_is_longer_than_the_limit() -> None:
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in _written_files()}
    long = {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > LONGEST}
    assert not long


def _written_files() -> list[Path]:
    folders = (*TREES, "tests", "benchmarks", "examples")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES and path.is_file()]


def test_a_file_name_is_used_once() -> None:
    """`verify.py` may be a command, and nothing else beside it."""
    places = defaultdict(list)
    for path in sources(*TREES):
        if path.name not in ("__init__.py", "__main__.py"):
            places[path.name].append(str(path.relative_to(ROOT)))
    assert not [paths for paths in places.values() if len(paths) > 1]


@pytest.mark.parametrize("name", [name for name, path in modules().items() if path.stem == "__init__"])
def test_a_package_says_in_two_lines_what_it_holds(name: str) -> None:
    docstring = ast.get_docstring(parsed(modules()[name]))
    assert docstring is not None
    lines = docstring.splitlines()
    assert len(lines) == 2 or (name in WITH_EXAMPLE and len(lines) > 2)
    assert all(len(line) <= 140 for line in lines)


def test_links_of_the_checkout_are_those_folders() -> None:
    """Editors and linters find `qwen_export.graphs` by a link that is committed."""
    for folder, package in TREES.items():
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        assert Path(spec.origin).resolve() == (ROOT / folder / "__init__.py").resolve()


def test_no_file_holds_marks_of_a_merge() -> None:
    marks = re.compile(rb"^(<{7}|>{7}|\|{7})( |$)", re.MULTILINE)
    files = tracked_files()
    assert files or not (ROOT / ".git").exists()
    assert not [str(path.relative_to(ROOT)) for path in files if marks.search(path.read_bytes())]


# Tests


def test_the_fast_tests_look_at_every_package() -> None:
    """`make test-fast`: each package that holds modules is imported by one of them."""
    paths = [ROOT / "tests" / name for name in FAST]
    names = {node.module or "" for path in paths for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom)}
    names |= {"qwen_export.plugins.standard.fix_sizes"} if "test_directml.py" in FAST else set()  # builds with the passes of `standard`
    packages = {name.rpartition(".")[0] for name, path in modules().items() if path.stem not in ("__init__", "__main__")}
    assert not [package for package in sorted(packages) if not any(within(name, package) for name in names)]


@pytest.mark.parametrize("path", sources("tests"), ids=lambda path: path.stem)
def test_tests_use_no_private_names(path: Path) -> None:
    """A test of what a user relies on survives another implementation."""
    assert not [f"line {line}: {name}" for line, name in _private_names(parsed(path)) if name not in FOREIGN]


def _private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        named: list[str] = []
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            named = [node.attr]
        elif isinstance(node, ast.ImportFrom) and within(node.module or "", "qwen_export"):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and _called(node).endswith(("setattr", "getattr", "delattr")):
            texts = [value.value for value in node.args[:2] if isinstance(value, ast.Constant) and isinstance(value.value, str)]
            named = [text.rpartition(".")[2] for text in texts]
        yield from ((node.lineno, name) for name in named if name.startswith("_") and not name.startswith("__"))


def _called(call: ast.Call) -> str:
    """The last part of a function's name."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""


@pytest.mark.parametrize("path", sources("tests"), ids=lambda path: path.stem)
def test_tests_measure_no_time(path: Path) -> None:
    """A machine may be busy: count calls, bytes, allocations or imports."""
    clocks = {"perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time", "process_time_ns", "time_ns"}
    names = {node.attr for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)}
    assert not names & clocks and "time.time()" not in path.read_text(encoding="utf-8").replace('"time.time()"', "")
