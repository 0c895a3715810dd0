"""From what a user calls a checkpoint to a path on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from qwen_export.downloads.hub_options import HUBS, ONLINE, HubOptions, hub_name
from qwen_export.errors import ParameterError


def local_checkpoint(checkpoint: str | Path, options: HubOptions = ONLINE) -> Path:
    """The path of a checkpoint that is given as a path or by its name on a hub, such as "Qwen/Qwen3.5-0.8B" or "owner/name-GGUF:Q8_0".

    What a build does not read is not downloaded. Raises CheckpointError for a model that is not available."""
    name = hub_name(checkpoint)
    if name is None:
        return Path(checkpoint)
    if options.hub not in HUBS:
        raise ParameterError(
            "there is no such hub", parameter="hub", got=options.hub, expected=" or ".join(HUBS), fix="Choose one of these for {hub}."
        )
    if options.hub == "modelscope":
        from qwen_export.downloads import modelscope_files

        return modelscope_files.download(name, options)
    from qwen_export.downloads import huggingface_files

    return huggingface_files.download(name, options)


@contextmanager
def inspected_checkpoint(checkpoint: str | Path, options: HubOptions = ONLINE) -> Iterator[Path]:
    """As `local_checkpoint`, for a look at headers: weights of a model of Hugging Face are not downloaded."""
    name = hub_name(checkpoint)
    if name is None or options.hub != "huggingface" or options.offline:
        yield local_checkpoint(checkpoint, options)
        return
    from qwen_export.downloads.huggingface_files import download_headers

    with TemporaryDirectory(prefix="qwen-export-headers-") as folder:
        yield download_headers(name, options, Path(folder))
