"""Which files of a directory hold the weights: the precedence of transformers, and the directories that are no checkpoint of a model.

1. `model.safetensors`. An index beside it counts only if it lists that file among its own.
2. The files that `model.safetensors.index.json` lists.
3. Without both, all safetensors files, which transformers does not read.

Any other safetensors file is ignored, with a note, except one that holds nothing but the draft head which the other files lack: tools that
quantize or fine-tune the decoder copy it to a file of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo, read_header
from qwen_export.graphs.json_file import AGAIN, read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_DRAFT_HEAD = "mtp."
_SHOWN = 3


def read_tensors(directory: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """All tensors of the checkpoint by their stored names, and notes on what was ignored. Raises CheckpointError."""
    refuse_adapter(directory)
    tensors, used, notes = _main(directory)
    others = [file for file in _weight_files(directory) if file.name not in used]
    ignored = []
    has_head = any(_DRAFT_HEAD in name for name in tensors)
    for file in others:
        head = {} if has_head else _draft_head(file)
        if head and not head.keys() & tensors.keys():
            tensors |= head
            has_head = True
            notes.append(f"the draft head is read from {file.name}, which no index lists")
        else:
            ignored.append(file.name)
    if ignored:
        notes.append(f"ignored beside the weights: {_some(ignored)}")
    return tensors, notes


def refuse_adapter(directory: Path) -> None:
    """Raise CheckpointError for the directory of a LoRA adapter or another PEFT adapter."""
    if not (directory / ADAPTER).exists():
        return
    settings = read_json_object(directory / ADAPTER, "adapter configuration")
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    adapter = f"{kind if isinstance(kind, str) else 'PEFT'} adapter"
    base_model = f"its base model {base[:100]}" if isinstance(base, str) and base else "its base model"
    if any(file.name not in _ADAPTER_WEIGHTS for file in _weight_files(directory)):
        raise CheckpointError(
            f"the directory holds a {adapter} beside weights of a model",
            where=str(directory),
            got=ADAPTER,
            fix=f"If the adapter is merged into the weights, move {ADAPTER} away. Else merge it first.",
        )
    raise CheckpointError(
        f"this is a {adapter}, not a model",
        where=str(directory),
        got=ADAPTER,
        fix=f"Give {base_model} as {{checkpoint}}, and this directory as {{lora}}.",
    )


def _weight_files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.glob("*.safetensors") if not file.name.startswith("."))


def _main(directory: Path) -> tuple[dict[str, TensorInfo], set[str], list[str]]:
    """Tensors, names of the files that were read, and notes."""
    single, index = directory / SINGLE, directory / INDEX
    listed = _index(index) if index.exists() else {}
    if single.exists():
        if SINGLE not in listed.values():
            notes = [f"{INDEX} is ignored: {SINGLE} is there and not in it"] if listed else []
            return read_header(single), {SINGLE}, notes
    elif not listed:
        files = [file for file in _weight_files(directory) if file.name not in _ADAPTER_WEIGHTS]
        if not files:
            raise _no_weights(directory)
        return _merge(files), {file.name for file in files}, []
    names = sorted(set(listed.values()))
    tensors = _merge([directory / name for name in names])
    for name, file in listed.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                "a tensor of the weight index is not in its file",
                where=str(index),
                got=f"{name} in {file}",
                fix=f"{AGAIN} Or remove the index.",
            )
    return tensors, set(names), []


def _index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path, "weight index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError("the weight index has no weight_map from tensors to files", where=str(path), fix=AGAIN)
    escaped = [
        name
        for name in sorted(set(weight_map.values()))
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name or _has_no_bytes(name)
    ]
    if escaped:
        raise CheckpointError(
            "the weight index names a file outside the directory",
            where=str(path),
            got=escaped[0][:200].encode("utf-8", "backslashreplace").decode(),
            fix=AGAIN,
        )
    return weight_map


def _has_no_bytes(name: str) -> bool:
    """Whether a text of JSON is no name of a file: half of a surrogate pair has no encoding."""
    try:
        return not os.fsencode(name)
    except UnicodeEncodeError:
        return True


def _merge(files: list[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    "a tensor is stored twice",
                    where=name,
                    got=f"{tensors[name].file.name} and {file.name}",
                    fix="Keep the files of one copy of the model in the directory.",
                )
            tensors[name] = tensor
    return tensors


def _draft_head(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file that holds a draft head and nothing else; none for any other file, also for one that is damaged."""
    try:
        found = read_header(file)
    except CheckpointError:
        return {}
    return found if found and all(_DRAFT_HEAD in f".{name}" for name in found) else {}


def _no_weights(directory: Path) -> CheckpointError:
    others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.npz") for file in directory.glob(pattern))
    return CheckpointError(
        "the directory has no safetensors files",
        where=str(directory),
        got=_some(others),
        fix="Save the model with transformers (save_pretrained writes safetensors), or download the safetensors files.",
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
