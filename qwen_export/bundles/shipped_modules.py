"""Which modules of qwen-export a machine needs that only runs bundles: those that can be imported there.

The commands and the runtime are followed import by import. A module whose top imports the compiler (`graphs`, `plugins`), or a package of
an extra that such a machine does not have, is left out; a command that needs one says so when it runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import qwen_export
from qwen_export.extras import EXTRAS

_ROOTS = ("qwen_export.commands", "qwen_export.runtimes")
_ABSENT_PACKAGES = ("qwen_export.graphs", "qwen_export.plugins")
_ABSENT = (*EXTRAS["export"], *EXTRAS["serve"])


def shipped_modules() -> dict[str, Path]:
    """Module names with their files, packages under their own name, sorted."""
    modules = {name: path for name, path in _all_modules() if not name.startswith(_ABSENT_PACKAGES)}
    at_top = {name: _imports(path, modules, top=True) for name, path in modules.items()}
    while broken := [name for name in modules if not at_top[name] <= modules.keys()]:
        for name in broken:
            del modules[name]
    wanted = {name for name in modules if name.startswith(_ROOTS)} | {"qwen_export", "qwen_export.__main__"}
    pending = list(wanted)
    while pending:
        name = pending.pop()
        parts = name.split(".")
        packages = {".".join(parts[:count]) for count in range(1, len(parts))}
        needed = ((_imports(modules[name], modules, top=False) & modules.keys()) | packages) - wanted
        wanted |= needed
        pending += needed
    return {name: modules[name] for name in sorted(wanted)}


def _all_modules() -> Iterator[tuple[str, Path]]:
    """Every module of the installation. In a checkout some folders are links, or are found beside this package."""
    for root in map(Path, qwen_export.__path__):
        for folder in [root] if root.name == "qwen_export" else [root / name for name in ("graphs", "plugins", "runtimes")]:
            base = "qwen_export" if folder.name == "qwen_export" else f"qwen_export.{folder.name}"
            for path in _python_files(folder):
                parts = path.relative_to(folder).with_suffix("").parts
                yield ".".join([base, *(part for part in parts if part != "__init__")]), path


def _python_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name != "__pycache__":
            yield from _python_files(path)
        elif path.suffix == ".py":
            yield path


def _imports(path: Path, modules: dict[str, Path], *, top: bool) -> set[str]:
    """Modules of qwen-export that a file imports, and the name of an absent package; with `top` only where the file itself is loaded."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _loaded(tree) if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` names the module, too.
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in modules}
    return {name for name in found if name.startswith("qwen_export.") or name.split(".")[0] in _ABSENT}


def _loaded(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is loaded: not those of functions, nor under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from _loaded(node)
