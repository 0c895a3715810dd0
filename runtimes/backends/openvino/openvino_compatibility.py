"""Can OpenVINO run the bundle on this machine?"""

from __future__ import annotations

import importlib.metadata

from qwen_export.errors import BundleError
from qwen_export.extras import install_line
from qwen_export.manifest import Manifest

OLDEST = (2026, 1)


def check_openvino(manifest: Manifest) -> str:
    """Raise BundleError with the exact mismatch. Returns what was found."""
    try:
        have = importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError as error:
        raise BundleError("OpenVINO is not installed", fix=install_line("openvino")) from error
    if tuple(int(part) for part in have.split(".")[:2]) < OLDEST:
        raise BundleError(
            "the installed OpenVINO is older than those that were tried",
            got=have,
            expected="at least " + ".".join(map(str, OLDEST)),
            fix="Run pip install -U openvino.",
        )
    if manifest.target.device != "cpu":
        raise BundleError(
            "bundles run on OpenVINO on the CPU only", got=manifest.target.device, expected="cpu", fix="Leave out {device}, or {runtime}."
        )
    if manifest.references:
        raise BundleError(
            "OpenVINO does not read weights outside the bundle",
            got=f"{len(manifest.references)} files of the checkpoint",
            fix="Make a complete bundle first: qwen-export package BUNDLE -o DIR.",
        )
    return f"openvino {have} (at least {OLDEST[0]}.{OLDEST[1]})"
