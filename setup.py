"""What pyproject.toml cannot say: compiled kernels, a wheel for the platform that they are for, and archives that are the same to the byte.

QWEN_EXPORT_KERNELS decides about the kernels of the CPU (plugins/native/cpu) in a wheel:

    auto      compile them where there is a compiler and a shell; a wheel without them is for any platform (default)
    require   fail where they cannot be compiled, as release builds do
    skip      take a library that is there already, and compile nothing

An editable installation compiles nothing: `make native` does.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist

NATIVE = Path("plugins/native")
KERNELS = NATIVE / "libqwen_export_cpu.so"
# The earliest date of a zip archive. Wheels take the dates of their entries from this variable.
os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")


def compile_kernels() -> None:
    wish = os.environ.get("QWEN_EXPORT_KERNELS", "auto")
    if wish not in ("auto", "require", "skip"):
        sys.exit(f"error: QWEN_EXPORT_KERNELS is {wish!r}. Set it to auto, require or skip.")
    if wish == "skip" or KERNELS.exists():
        return
    possible = shutil.which("sh") is not None and shutil.which(os.environ.get("CXX", "c++")) is not None
    failed = not possible or subprocess.run(["sh", str(NATIVE / "cpu" / "build.sh")], check=False).returncode != 0
    if failed and wish == "require":
        sys.exit("error: the CPU kernels were not compiled. Install a C++ compiler, or set QWEN_EXPORT_KERNELS to skip.")
    if failed:
        print("note: the CPU kernels were not compiled: bundles will use those of ONNX Runtime", file=sys.stderr)


if "bdist_wheel" in sys.argv:
    compile_kernels()
COMPILED = any(NATIVE.glob("*.so"))


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        """Whether files go to the platform's folder, and the wheel's name has the platform."""
        return COMPILED


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-PLATFORM with a library: ONNX Runtime loads it, so the version of Python does not matter."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if COMPILED else (python, abi, platform)


class SourceArchive(sdist):
    def make_archive(self, base_name: str, format: str, root_dir=None, base_dir=None, owner=None, group=None) -> str:  # type: ignore[no-untyped-def, override]
        """A tar.gz whose entries are in order, without owners, and of the time that SOURCE_DATE_EPOCH says."""
        if format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        path, when = Path(f"{base_name}.tar.gz"), int(os.environ["SOURCE_DATE_EPOCH"])
        path.parent.mkdir(parents=True, exist_ok=True)

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = when
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            return entry

        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", mtime=when, fileobj=file) as packed,
            tarfile.open(mode="w", fileobj=packed, format=tarfile.PAX_FORMAT) as archive,
        ):
            for found in sorted(Path(str(base_dir)).rglob("*")):
                archive.add(found, recursive=False, filter=plain)
        return str(path)


setup(distclass=Package, cmdclass={"bdist_wheel": Wheel, "sdist": SourceArchive})
