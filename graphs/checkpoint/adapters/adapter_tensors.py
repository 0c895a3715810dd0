"""adapter_model.safetensors of PEFT: updates and replaced weights by the names of a release's tensors.

    PREFIX.MODULE.lora_A.weight, lora_B.weight        a matrix; for `target_parameters` a parameter of MODULE, or of
    PREFIX.MODULE.base_layer.lora_A.weight            the same MODULE where two of its parameters have updates
    PREFIX.MODULE.lora_embedding_A, lora_embedding_B  an embedding
    PREFIX.MODULE.lora_magnitude_vector               with DoRA
    PREFIX.MODULE.weight                              `modules_to_save`: a whole weight

PREFIX is a chain of the wrappers that `stored_prefixes` knows. Some tools leave the name of the adapter in: lora_A.default.weight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_export.errors import CheckpointError, UnsupportedError
from qwen_export.graphs.checkpoint.adapters.adapter_config import AdapterConfig
from qwen_export.graphs.checkpoint.adapters.low_rank import LowRank
from qwen_export.graphs.checkpoint.formats.logical_tensor import PLAIN_TYPES
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo, read_header
from qwen_export.graphs.checkpoint.stored_prefixes import release_name
from qwen_export.graphs.json_file import AGAIN

WEIGHTS = "adapter_model.safetensors"
_PART = re.compile(r"(.+?)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.(?!bias$)\w+)?(\.weight)?")
_INNER = re.compile(r"\.(base_layer|modules_to_save(\.(?!weight$|bias$)\w+)?)(?=\.|$)")
_PAIRS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}


@dataclass(frozen=True)
class Update:
    """Matrices of one module. `module` is its name in the adapter, `name` that of its weight in a release."""

    module: str
    name: str
    a: TensorInfo
    b: TensorInfo
    embedding: bool
    magnitude: TensorInfo | None

    def low_rank(self, config: AdapterConfig, scale: float, rows: int, experts: int = 1) -> LowRank:
        """`scale` on top of that of the adapter."""
        factor = config.scaling(self.module, self.a.shape[0] // experts) * scale
        return LowRank(self.a, self.b, factor, rows, experts, self.embedding, self.magnitude)


@dataclass(frozen=True)
class AdapterTensors:
    updates: list[Update]
    replaced: dict[str, TensorInfo]
    """Whole weights by their names in a release."""


def read_adapter_tensors(directory: Path, decoder_prefix: str) -> AdapterTensors:
    """All of an adapter's tensors. Raises CheckpointError for parts that are missing, UnsupportedError for parts that are not merged."""
    path = directory / WEIGHTS
    if not path.exists() and (directory / "adapter_model.bin").exists():
        raise UnsupportedError(
            "the adapter is stored as a pickle", where=str(directory / "adapter_model.bin"), fix="Save it with PEFT as safetensors."
        )
    modules: dict[str, dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    for name, info in read_header(path).items():
        if info.dtype not in PLAIN_TYPES:
            raise UnsupportedError(
                "a tensor of the adapter has an element type that is not merged",
                where=f"{path}, tensor {name}",
                got=info.dtype,
                expected=", ".join(PLAIN_TYPES),
                fix="Save the adapter in fp32 or bf16.",
            )
        part = _PART.fullmatch(name)
        if part is not None:
            modules.setdefault(part[1], {})[part[2]] = info
        elif name.endswith(".weight") and "trainable_tokens" not in name and "original_module" not in name:
            released = release_name(_INNER.sub("", name), decoder_prefix)
            replaced[released] = replace(info, name=released, stored_name=name)
        else:
            raise UnsupportedError(
                "the adapter has a tensor that is not merged",
                where=f"{path}, tensor {name}",
                expected="LoRA matrices, magnitudes of DoRA, and whole weights",
                fix="Merge the adapter with PEFT (merge_and_unload).",
            )
    if not modules and not replaced:
        raise CheckpointError("the adapter has no tensors", where=str(path), fix=AGAIN)
    return AdapterTensors([_update(path, module, parts, decoder_prefix) for module, parts in modules.items()], replaced)


def _update(path: Path, module: str, parts: dict[str, TensorInfo], decoder_prefix: str) -> Update:
    first = next((name for name in _PAIRS if name in parts), "lora_A")
    a, b = parts.get(first), parts.get(_PAIRS[first])
    if a is None or b is None:
        raise CheckpointError(
            "a module of the adapter has one of its two matrices only", where=f"{path}, {module}", got=", ".join(parts), fix=AGAIN
        )
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise CheckpointError(
            "the matrices of a module do not fit each other", where=f"{path}, {module}", got=f"{a.shape}, {b.shape}", fix=AGAIN
        )
    plain = _INNER.sub("", module)
    name = release_name(f"{plain}.weight", decoder_prefix)
    return Update(plain, name, a, b, first != "lora_A", parts.get("lora_magnitude_vector"))
