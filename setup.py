"""What pyproject.toml cannot say: a wheel that holds a compiled library is for one platform."""

from __future__ import annotations

from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel

COMPILED = any(Path("plugins/native").glob("*.so"))


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        """Whether files go to the platform's folder, and the wheel's name has the platform."""
        return COMPILED


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-PLATFORM with a library: ONNX Runtime loads it, so the version of Python does not matter."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if COMPILED else (python, abi, platform)


setup(distclass=Package, cmdclass={"bdist_wheel": Wheel})
