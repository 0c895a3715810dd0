"""Archives and wheels of this project, made from a copy of its sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.source_tree import ROOT, TREES

PROJECT = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "constraints.txt")


def copied_tree(copy: Path) -> Path:
    """What packages are made of, without libraries that were compiled here."""
    for name in TREES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.ptx"))
    for name in PROJECT:
        shutil.copy(ROOT / name, copy / name)
    return copy


def packaged(tree: Path, kind: str, **variables: str) -> Path:
    """The sdist or wheel that setuptools makes of a source tree. Kernels are not compiled unless `variables` say so."""
    out = tree.parent / kind
    code = f"import setuptools.build_meta as build; build.build_{kind}({str(out)!r})"
    out.mkdir(exist_ok=True)
    environment = os.environ | {"QWEN_EXPORT_KERNELS": "skip"} | variables
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tree, env=environment)
    (made,) = out.iterdir()
    return made
