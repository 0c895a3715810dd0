"""Every `raise` of a package, read with `ast`: which error, and the literal text of its parts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qwen_export import errors
from tests.support.source_tree import ROOT, parsed

PARAMETER = re.compile(r"\{([a-z_][a-z0-9_]*)\}")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.QwenExportError)}


@dataclass(frozen=True)
class Made:
    """A call that makes an error. `parts`: the texts that the source has for each part, with "…" for what is filled in."""

    path: Path
    line: int
    kind: str
    parts: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def errors_made(path: Path) -> Iterator[Made]:
    """Every error of this project that a file makes: raised there, or made for another function that raises it."""
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        # By its plain name: jinja2.TemplateError is another one.
        kind = node.func.id if isinstance(node.func, ast.Name) else ""
        if kind in KINDS:
            given = {"what": node.args[0]} if node.args else {}
            given |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            yield Made(path, node.lineno, kind, {part: texts(value, path) for part, value in given.items()})


def texts(node: ast.expr, path: Path) -> tuple[str, ...]:
    """What an expression can be, as far as it is written down: each branch of a choice, names by what is assigned to them."""
    if isinstance(node, ast.Constant):
        return (str(node.value),)
    if isinstance(node, ast.JoinedStr):
        return ("".join(str(value.value) if isinstance(value, ast.Constant) else "…" for value in node.values),)
    if isinstance(node, ast.IfExp):
        return (*texts(node.body, path), *texts(node.orelse, path))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return tuple(left + right for left in texts(node.left, path) for right in texts(node.right, path))
    if isinstance(node, ast.BoolOp):
        return tuple(text for value in node.values for text in texts(value, path))
    if isinstance(node, ast.Name):
        return tuple(text for value in _assigned(path).get(node.id, ()) for text in texts(value, path)) or ("…",)
    return ("…",)


@cache
def _assigned(path: Path) -> dict[str, tuple[ast.expr, ...]]:
    """Texts that a file assigns to a name, anywhere in it. Only literals: others could name each other."""
    found: dict[str, tuple[ast.expr, ...]] = {}
    for node in ast.walk(parsed(path)):
        pairs = [(target, node.value) for target in node.targets] if isinstance(node, ast.Assign) else []
        for target, value in pairs:
            targets = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                targets = list(zip(target.elts, value.elts, strict=False))
            for name, text in targets:
                if isinstance(name, ast.Name) and _literal(text):
                    found[name.id] = (*found.get(name.id, ()), text)
    return found


def _literal(node: ast.expr) -> bool:
    if isinstance(node, ast.IfExp):
        return _literal(node.body) and _literal(node.orelse)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
