"""Loading the native libraries of a bundle without a graph, to find out whether that works."""

from __future__ import annotations

from pathlib import Path

from qwen_export.errors import BundleError
from qwen_export.manifest import Manifest, file_path


def load_plugins(bundle: Path, manifest: Manifest) -> None:
    """Load the libraries as a session would. Raises BundleError where one cannot be loaded."""
    if manifest.target.backend != "onnxruntime":
        return
    import onnxruntime as ort

    for name in manifest.plugins:
        path = file_path(bundle, name)
        try:
            ort.SessionOptions().register_custom_ops_library(str(path.resolve()))
        except Exception as error:  # ONNX Runtime raises several unrelated types
            raise BundleError(
                "a library of the bundle cannot be loaded on this machine",
                where=str(path),
                got=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
                fix="Build the checkpoint on a machine like this one, or without the plugin.",
            ) from error
