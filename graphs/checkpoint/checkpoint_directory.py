"""A checkpoint directory: which tensor lies in which file, whatever the shards are called."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.formats.format_table import logical_weights
from qwen_export.graphs.checkpoint.formats.logical_tensor import LogicalTensor
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo, read_header
from qwen_export.graphs.config import CheckpointConfig, load_config

INDEX = "model.safetensors.index.json"
# Where ModelOpt says how it quantized, in checkpoints whose config.json does not.
MODELOPT = "hf_quant_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """Configuration and tensor table; no weight has been read. `tensors` are those of the files; `rope_scaling` is what the configuration
    was told in the place of its own."""

    path: Path
    config: CheckpointConfig
    tensors: dict[str, TensorInfo]
    rope_scaling: str | None = None

    @cached_property
    def weights(self) -> dict[str, LogicalTensor]:
        """The weights under their plain names, however they are stored. Raises QwenExportError for a quantization that cannot be read."""
        return logical_weights(self.tensors, self.config.quantization)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: str | Path, rope_scaling: str | None = None) -> Checkpoint:
    """Read config.json and the headers of all weight files. `rope_scaling`, like "yarn:4", takes the place of the one in config.json."""
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError("the checkpoint is not a directory", where=str(path), fix="Give the directory that holds config.json.")
    config = load_config(directory, rope_scaling)
    if not config.quantization and (directory / MODELOPT).exists():
        config = replace(config, quantization={"quant_method": "modelopt"} | _json_object(directory / MODELOPT, "quantization settings"))
    return Checkpoint(directory, config, _tensors(directory), rope_scaling)


def _json_object(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"the {what} cannot be read", where=str(path), got=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the {what} is not valid JSON", where=str(path), got=error) from error
    return content if isinstance(content, dict) else {}


def _tensors(directory: Path) -> dict[str, TensorInfo]:
    index = directory / INDEX
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError("the directory has no safetensors files", where=str(directory))
        return _merge(files)
    weight_map = _json_object(index, "weight index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError("the weight index has no weight_map from tensors to files", where=str(index))
    names = sorted(set(weight_map.values()))
    escaped = [name for name in names if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name]
    if escaped:
        raise CheckpointError("the weight index names a file outside the directory", where=str(index), got=escaped[0])
    tensors = _merge([directory / name for name in names])
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError("a tensor of the weight index is not in its file", where=str(index), got=f"{name} in {file}")
    return tensors


def _merge(files: list[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError("a tensor is stored twice", where=name, got=f"{tensors[name].file.name} and {file.name}")
            tensors[name] = tensor
    return tensors
