"""The table of docs/errors.md: every error that the sources raise. A hook of mkdocs; `python docs/error_reference.py` prints it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARK = "<!-- every error -->"
ROOMS = {
    "graphs": "Checkpoints, models and weights",
    "plugins": "Lowerings",
    "qwen_export/building": "Building",
    "qwen_export/verification": "Verification",
    "qwen_export/bundles": "Bundles and packages",
    "qwen_export/commands": "Command line",
    "qwen_export/terminal": "Chat",
    "qwen_export/downloads": "Hubs",
    "qwen_export": "Manifests and options",
    "runtimes/server": "Server",
    "runtimes/serving": "Engine",
    "runtimes/vision": "Pictures and videos",
    "runtimes/structured": "Structured answers",
    "runtimes": "Running",
}
"""Folder -> heading. A file belongs to the longest folder that holds it; headings stand in this order."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The hook: mkdocs calls it for each page."""
    return markdown.replace(MARK, table()) if MARK in markdown else markdown


def table() -> str:
    """Sections by room, in each a table of messages and fixes."""
    found: dict[str, set[tuple[str, str]]] = {heading: set() for heading in ROOMS.values()}
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in _sources()}
    sentences = {name: text for tree in trees.values() for name, text in _constants(tree)}
    for path, tree in trees.items():
        found[_heading(path)].update(_errors(tree, sentences))
    sections = []
    for heading, errors in found.items():
        if errors:
            rows = [f"| {_cell(what)} | {_cell(fix)} |" for what, fix in sorted(errors, key=lambda pair: pair[0].lower())]
            sections.append("\n".join([f"## {heading}", "", "| message | what to do |", "|---|---|", *rows]))
    return "\n\n".join(sections)


def _sources() -> list[Path]:
    """The packages, without the links by which one shows the others."""
    paths = [path for folder in ("graphs", "plugins", "qwen_export", "runtimes") for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in paths if not any(parent.is_symlink() for parent in path.parents))


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names of a module that stand for a sentence, such as a fix that several errors share."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            text = _text(node.value, {})
            if text:
                yield node.targets[0].id, text


def _heading(path: Path) -> str:
    folder = path.relative_to(ROOT).parent.as_posix()
    return ROOMS[max((room for room in ROOMS if f"{folder}/".startswith(f"{room}/")), key=len)]


def _errors(tree: ast.AST, sentences: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What fails, and the fix, of each call with a keyword `fix`. A call that hands on another's words has none of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            fix = next((keyword.value for keyword in node.keywords if keyword.arg == "fix"), None)
            what = _text(node.args[0], sentences)
            if fix is not None and what:
                yield what, _text(fix, sentences)


def _text(node: ast.expr, sentences: dict[str, str]) -> str:
    """The words of a string. A part that is filled in is an ellipsis, and a name in braces is a parameter."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return sentences.get(node.id, "")
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, sentences) or "…"
    if isinstance(node, ast.JoinedStr):
        parts = [_text(part, sentences) for part in node.values]
        return "".join(parts) if any(part.strip(" …") for part in parts) else ""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, sentences) + _text(node.right, sentences)
    if isinstance(node, ast.IfExp):
        return " / ".join(filter(None, (_text(node.body, sentences), _text(node.orelse, sentences))))
    return ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;") or "…"


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
