"""The wheels of a package for Windows: fetched by pip on any machine, and checked as an installation without a network would see them.

pip takes the conditions of requirements ("only on Windows") for those of the machine that it runs on; here they are evaluated for Windows.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

from qwen_export.errors import QwenExportError

PYTHONS = ("3.11", "3.12", "3.13")
"""Versions of Python for which every requirement has a wheel for win_amd64."""
LONGEST_INSTALLED = 259 - 100 - len("\\env\\Lib\\site-packages\\")
"""Characters of a path in site-packages: what 260 leave in a folder of 100, which run.ps1 allows where long paths are not enabled."""


def fetch_wheels(wanted: str, directory: Path, python: str) -> None:
    """Download the wheels of a requirements file's text, and of all that they require. Raises QwenExportError where one is not available,
    is missing afterwards, or has a path that is too long."""
    listed = directory / "requirements.txt"
    listed.write_text(wanted, encoding="utf-8")
    platform = ["--only-binary=:all:", "--platform", "win_amd64", "--python-version", python, "--implementation", "cp"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(directory), *platform, "--requirement", str(listed)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), done.stderr.strip()[-200:])
        raise QwenExportError("pip could not fetch the wheels for Windows", got=reason, fix="Leave out {wheels}, or check the network.")
    if missing := missing_wheels(directory, python):
        raise QwenExportError(
            "wheels that Windows needs are not among those that pip has fetched",
            got=", ".join(missing),
            fix="Leave out {wheels}: run.ps1 then fetches what it needs.",
        )
    name, path = max(
        ((wheel.name, path) for wheel in directory.glob("*.whl") for path in installed_paths(wheel)), key=lambda at: len(at[1])
    )
    if len(path) > LONGEST_INSTALLED:
        raise QwenExportError(
            "a file of a wheel has a path that Windows may not take",
            where=name,
            got=f"{path}, {len(path)} characters",
            expected=f"at most {LONGEST_INSTALLED}",
            fix="Leave out {wheels}, and install where long paths are enabled.",
        )


def missing_wheels(directory: Path, python: str) -> list[str]:
    """What wheels of a directory require on Windows with this Python and is not there in a version that fits, "NAME requires WHAT"."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name, parse_wheel_filename

    wheels = {path: parse_wheel_filename(path.name) for path in sorted(directory.glob("*.whl"))}
    there = {name: version for name, version, _, _ in wheels.values()}
    missing = []
    for path, (owner, *_) in wheels.items():
        for line in _requirements(path):
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate(_windows(python)):
                version = there.get(canonicalize_name(wanted.name))
                if version is None or not wanted.specifier.contains(version, prereleases=True):
                    missing.append(f"{owner} requires {wanted.name}{wanted.specifier}")
    return missing


def installed_paths(wheel: Path) -> list[str]:
    """Paths below site-packages that an installation of a wheel makes, those of compiled modules included."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".data/" not in name]
    return [*names, *(_compiled(name) for name in names if name.endswith(".py"))]


def _compiled(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/__pycache__/{file.removesuffix('.py')}.cpython-313.pyc"


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return BytesParser().parsebytes(archive.read(name)).get_all("Requires-Dist") or []


def _windows(python: str) -> dict[str, str]:
    """What conditions of requirements see there. No extra is wanted."""
    return {
        "os_name": "nt",
        "sys_platform": "win32",
        "platform_system": "Windows",
        "platform_machine": "AMD64",
        "platform_release": "10",
        "platform_version": "10.0",
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "platform_python_implementation": "CPython",
        "python_version": python,
        "python_full_version": f"{python}.0",
        "extra": "",
    }
