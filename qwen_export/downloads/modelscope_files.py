"""A model of ModelScope in its cache, through the package `modelscope`."""

from __future__ import annotations

from pathlib import Path

from qwen_export.downloads.hub_options import HubName, HubOptions
from qwen_export.downloads.needed_files import TEXTS, gguf
from qwen_export.errors import CheckpointError
from qwen_export.extras import needed_for


def download(name: HubName, options: HubOptions) -> Path:
    """The directory of the model in the cache, or its GGUF file: with a file named, files whose names have it. Raises CheckpointError."""
    with needed_for("a model of ModelScope"):
        from modelscope import snapshot_download
    patterns = [f"*{name.file}*"] if name.file else [*TEXTS, "*.safetensors"]
    try:
        found = snapshot_download(name.model, revision=options.revision, local_files_only=options.offline, allow_patterns=patterns)
    except Exception as error:  # of the package, of requests, and ValueError for what is not in the cache
        raise CheckpointError(
            "the model could not be had from ModelScope",
            where=str(name),
            got=(str(error).splitlines() or [""])[0][:200],
            fix="Correct the name or {revision}; leave out {offline} on a machine with a network; or give a directory.",
        ) from error
    directory = Path(found)
    files = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    return directory if any(file.endswith(".safetensors") for file in files) else directory / gguf(name, files)[0]
