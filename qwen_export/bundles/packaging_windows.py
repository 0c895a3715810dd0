"""A bundle as one zip file for a Windows machine: bundle, the runtime's own modules, pinned requirements, a script that runs it, and on
request the wheels of everything it needs, for machines without a network."""

from __future__ import annotations

import importlib.metadata
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path, PurePosixPath

from qwen_export.bundles.shipped_modules import shipped_modules
from qwen_export.bundles.windows_wheels import PYTHONS, fetch_wheels
from qwen_export.errors import ParameterError, QwenExportError
from qwen_export.manifest import DIGEST, MANIFEST, SIGNATURE, Manifest, load_manifest
from qwen_export.runtimes.backends.integrity import ensure_whole

PINNED = {"dml": "onnxruntime-directml==1.24.4", "cpu": "onnxruntime"}
_SHARED = ("numpy", "tokenizers", "jinja2", "click", "rich", "psutil", "platformdirs")
_WINDOWS_ONLY = ("colorama==0.4.6",)
"""What packages need on Windows alone: pip takes the conditions for those of the machine that downloads."""
_LONGEST_NAME = 120
"""Path within the zip. Windows allows 260 characters in all where long paths are not enabled, and the folder needs some of them."""
_FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f]|[ .](/|$)')
_RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{i}" for name in ("com", "lpt") for i in range(1, 10))}
_EPOCH = (1980, 1, 1, 0, 0, 0)

Progress = Callable[[str, int], None]
"""Called with a file's name and the bytes just packed."""


def package_windows(
    bundle: str | Path, output: str | Path, *, wheels: bool = False, python: str = PYTHONS[1], progress: Progress | None = None
) -> Path:
    """Write the zip file `output` and return its path. With `wheels` pip fetches the wheels for win_amd64 into it. `python` is the version
    that they are for, and that run.ps1 runs.

    The bundle is hashed first. Raises QwenExportError; on any failure no file is left at `output`."""
    say = progress or (lambda name, count: None)
    directory, destination = Path(bundle), Path(output)
    if destination.suffix.lower() != ".zip":
        raise QwenExportError("the package for Windows is a zip file", got=str(output), fix="Give {output} a name that ends in .zip.")
    if destination.exists():
        raise QwenExportError("the output exists already", where=str(output), fix="Give another {output}.")
    if python not in PYTHONS:
        raise ParameterError(
            "packages for Windows are not made for this Python",
            parameter="python",
            got=python,
            expected=", ".join(PYTHONS),
            fix="Give one of these.",
        )
    manifest = load_manifest(directory)
    if manifest.target.device not in PINNED:
        raise QwenExportError(
            "the bundle is for a device that packages for Windows do not have",
            got=manifest.target.device,
            expected="dml or cpu",
            fix="Build with {target} directml.",
        )
    if manifest.references:
        raise QwenExportError(
            "the bundle refers to weights that are outside it",
            where=str(bundle),
            fix="Make a complete one first: qwen-export package BUNDLE -o DIR.",
        )
    if manifest.plugins:
        raise QwenExportError(
            "the bundle has a native library, which was not compiled for Windows",
            got=", ".join(manifest.plugins),
            fix="Build with {target} directml or onnx.",
        )
    ensure_whole(directory, manifest)
    folder = _safe_folder(destination.stem)
    descriptor, name = tempfile.mkstemp(prefix=f".{destination.name}.", dir=destination.absolute().parent)
    os.close(descriptor)
    try:
        with zipfile.ZipFile(name, "w", allowZip64=True) as archive, tempfile.TemporaryDirectory() as fetched:
            for inside, source in package_files(directory, manifest, python, Path(fetched) if wheels else None):
                _add(archive, f"{folder}/{inside}", source, say)
        os.replace(name, destination)
    except OSError as error:
        raise QwenExportError(
            "the package could not be written",
            where=str(output),
            got=error.strerror or error,
            fix="Check the path, its permissions and the space on the disk.",
        ) from error
    finally:
        Path(name).unlink(missing_ok=True)
    return destination


def requirements(device: str) -> str:
    """The pinned requirements file: what this machine has tested, and the last ONNX Runtime with DirectML."""
    lines = [f"{name}=={importlib.metadata.version(name)}" for name in _SHARED]
    backend = PINNED[device]
    return "\n".join([backend if "==" in backend else f"{backend}=={importlib.metadata.version(backend)}", *lines, *_WINDOWS_ONLY]) + "\n"


def package_files(directory: Path, manifest: Manifest, python: str, fetched: Path | None) -> Iterator[tuple[str, Path | str]]:
    """Names inside the package with their file, or text."""
    for name in (MANIFEST, DIGEST, SIGNATURE, *manifest.files):
        if (directory / name).exists():
            yield f"bundle/{name}", directory / name
    wanted = requirements(manifest.target.device)
    yield "requirements.txt", wanted
    script = resources.files("qwen_export.bundles").joinpath("run.ps1").read_text(encoding="utf-8")
    yield "run.ps1", script.replace("PYVERSION", python)
    yield "README.txt", _README.replace("PYVERSION", python)
    yield "app/__main__.py", _MAIN
    for module, path in shipped_modules().items():
        inside = module.replace(".", "/")
        yield f"app/{inside}/__init__.py" if path.name == "__init__.py" else f"app/{inside}.py", path
    if fetched is not None:
        fetch_wheels(wanted, fetched, python)
        for path in sorted(fetched.glob("*.whl")):
            yield f"wheels/{path.name}", path


def _safe_folder(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-. ") or "qwen"


def _add(archive: zipfile.ZipFile, name: str, source: Path | str, say: Progress) -> None:
    parts = PurePosixPath(name).parts
    if len(name) > _LONGEST_NAME or _FORBIDDEN.search(name) or any(part.split(".")[0].lower() in _RESERVED for part in parts):
        raise QwenExportError("a file has a name that Windows does not take", where=name, fix="Rename it and build the bundle again.")
    # Weights do not get smaller, and storing them lets Windows unpack at the speed of the disk.
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED if name.endswith((".py", ".txt", ".ps1", ".json", ".jinja")) else zipfile.ZIP_STORED
    if isinstance(source, str):
        # PowerShell 5 takes a script without a byte order mark for the local code page.
        encoding = "utf-8-sig" if name.endswith(".ps1") else "utf-8"
        archive.writestr(entry, source.replace("\n", "\r\n").encode(encoding))
        return
    entry.file_size = source.stat().st_size
    with source.open("rb") as file, archive.open(entry, "w") as target:
        while block := file.read(8 << 20):
            target.write(block)
            say(name, len(block))


_MAIN = """import json
import os

from qwen_export.commands.cli import main

main(["run", os.path.join(os.path.dirname(os.path.dirname(__file__)), "bundle"), *json.loads(os.environ.pop("QWEN_EXPORT_ARGUMENTS"))])
"""

_README = """A Qwen model for Windows, made by qwen-export.

Needs 64-bit Windows 10 or 11 and Python PYVERSION (python.org, or: winget install Python.Python.PYVERSION).
In this folder, in PowerShell:

    powershell -ExecutionPolicy Bypass -File .\\run.ps1 "Why is the sky blue?" --chat

bundle\\ is the model, app\\ the runtime, requirements.txt what it needs; wheels\\, where it is there, makes the network unnecessary.
"""
