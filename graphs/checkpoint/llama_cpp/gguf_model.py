"""A GGUF model from the headers of its files: configuration, weights and text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.formats.logical_tensor import LogicalTensor
from qwen_export.graphs.checkpoint.llama_cpp.gguf_config import TILED, architecture_of, config_of
from qwen_export.graphs.checkpoint.llama_cpp.gguf_files import read_parts
from qwen_export.graphs.checkpoint.llama_cpp.gguf_names import EMBEDDING, HEAD, weights_of
from qwen_export.graphs.checkpoint.llama_cpp.gguf_text import GgufText
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo
from qwen_export.graphs.checkpoint.stored_prefixes import MTP_PREFIX
from qwen_export.graphs.config import CheckpointConfig, parse_config
from qwen_export.graphs.json_file import AGAIN
from qwen_export.graphs.rope_scaling import with_rope_scaling


@dataclass(frozen=True)
class GgufModel:
    """What a checkpoint directory holds, by the names of a release. `parts`: where each weight is stored."""

    config: CheckpointConfig
    weights: dict[str, LogicalTensor]
    text: GgufText
    notes: tuple[str, ...]

    @property
    def parts(self) -> dict[str, TensorInfo]:
        return {name: replace(part, name=name, stored_name=part.name) for name, weight in self.weights.items() for part in weight.parts}


def read_model(files: list[Path], rope_scaling: str | None = None) -> GgufModel:
    """The model in `files`, the parts of one. `rope_scaling` as in `open_checkpoint`. Reads headers only.

    Raises QwenExportError: for a damaged file, another family, and metadata that would change the model."""
    metadata, tensors = read_parts(files)
    name = architecture_of(metadata, files[0])
    embedding = tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError("the GGUF file has no embedding", where=str(files[0]), expected=EMBEDDING, fix=AGAIN)
    raw = config_of(metadata, embedding.shape[0], tied=HEAD not in tensors, where=files[0])
    text = GgufText(metadata, files[0])
    raw["eos_token_id"] = text.stop_ids or None
    config = parse_config(raw if rope_scaling is None else with_rope_scaling(raw, rope_scaling), where=str(files[0]))
    tiled = name != "qwen3next" and metadata.get(f"{name}.{TILED}", True) is True
    weights, notes = weights_of(tensors, config, tiled=tiled)
    if not any(weight.startswith(MTP_PREFIX) for weight in weights):
        config = replace(config, text=replace(config.text, mtp_num_hidden_layers=0))
    if any(weight.quantized for weight in weights.values()):
        config = replace(config, quantization={"quant_method": "gguf"})
    return GgufModel(config, weights, text, tuple(notes))
