"""The Python files of this repository and what they import, read with `ast`."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TREES = {"qwen_export": "qwen_export", "graphs": "qwen_export.graphs", "plugins": "qwen_export.plugins", "runtimes": "qwen_export.runtimes"}
"""Folder of this repository: the package that it is installed as."""


def sources(*trees: str) -> list[Path]:
    """Every Python file of these folders. Links are not followed: `qwen_export/graphs` is `graphs`."""
    return [path for tree in trees for path in sorted((ROOT / tree).rglob("*.py"))]


def module_name(path: Path) -> str:
    """qwen_export.graphs.config for graphs/config.py."""
    tree, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([TREES[tree], *(part for part in rest if part != "__init__")])


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def modules() -> dict[str, Path]:
    """Every module of the wheel, by name."""
    return {module_name(path): path for path in sources(*TREES)}


@cache
def imported_modules(name: str) -> frozenset[str]:
    """The modules of the wheel that a module imports, in functions and under TYPE_CHECKING, too.

    `from package import x` is an import of `package.x` where that is a module, and of `package` otherwise.
    """
    return frozenset(target for target in _named_modules(parsed(modules()[name])) if target in modules())


def _named_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                yield member if member in modules() else node.module


def tracked_files() -> list[Path]:
    """Every file that git tracks or would track. Empty where this is no checkout, or git is not installed."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file() and not (ROOT / name).is_symlink()]
