"""A checkpoint directory: its configuration, and which tensor is stored where.

What config.json and the files disagree on is decided here, by what is stored: the head, the draft head, the names of tensors.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.adapters.merge_adapters import AdapterSource, merged
from qwen_export.graphs.checkpoint.formats.format_table import logical_weights
from qwen_export.graphs.checkpoint.formats.logical_tensor import LogicalTensor
from qwen_export.graphs.checkpoint.llama_cpp.gguf_files import gguf_files
from qwen_export.graphs.checkpoint.llama_cpp.gguf_model import read_model
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo
from qwen_export.graphs.checkpoint.stored_heads import decide_draft_head, decide_head
from qwen_export.graphs.checkpoint.stored_prefixes import released_names
from qwen_export.graphs.checkpoint.vocabulary import vocabulary_reason
from qwen_export.graphs.checkpoint.weight_files import read_tensors, refuse_adapter
from qwen_export.graphs.config import CheckpointConfig, load_config
from qwen_export.graphs.json_file import read_json_object

# The settings of ModelOpt, in checkpoints whose config.json does not have them.
_MODELOPT = "hf_quant_config.json"


class TextSource(Protocol):
    """The text half of a checkpoint that is not in files of its directory."""

    def write(self, directory: Path) -> None:
        """Write tokenizer.json, chat_template.jinja and what else there is, as a release has them."""

    def vocabulary_reason(self, rows: int) -> str:
        """As `vocabulary.vocabulary_reason`."""


@dataclass(frozen=True)
class Checkpoint:
    """Configuration and tensor table; no weight has been read. `tensors` are those of the files, by their names in the releases;
    `rope_scaling` replaced the scaling of config.json; `notes` are for people: what was ignored or decided, in one line each."""

    path: Path
    config: CheckpointConfig
    tensors: dict[str, TensorInfo]
    rope_scaling: str | None = None
    notes: tuple[str, ...] = ()
    logical: Mapping[str, LogicalTensor] | None = None
    """The weights, where they do not follow from `tensors` and the quantization alone."""
    text: TextSource | None = None
    """Who writes tokenizer, templates and generation settings, where they are not files in `path`."""
    adapters: tuple[AdapterSource, ...] = ()
    """What is merged into the weights."""

    @cached_property
    def weights(self) -> dict[str, LogicalTensor]:
        """The weights under their plain names, however they are stored. Raises QwenExportError for a quantization that cannot be read."""
        return dict(self.logical) if self.logical is not None else logical_weights(self.tensors, self.config.quantization)

    @cached_property
    def text_directory(self) -> Path:
        """The directory of tokenizer, templates and generation settings: `path`, or one that is removed with this object."""
        if self.text is None:
            return self.path
        directory = Path(tempfile.mkdtemp(prefix="qwen-export-text-"))
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self.text.write(directory)
        return directory

    @cached_property
    def vocabulary_reason(self) -> str:
        """Why the tokenizer does not fit the embedding, "" where it does or there is none. Raises CheckpointError for a damaged file."""
        rows = self.config.text.vocab_size
        return vocabulary_reason(self.path, rows) if self.text is None else self.text.vocabulary_reason(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; what two of them share counts once."""
        return sum({(tensor.file, tensor.offset): tensor.nbytes for tensor in self.tensors.values()}.values())


def open_checkpoint(path: str | Path, rope_scaling: str | None = None, adapters: Sequence[AdapterSource] = ()) -> Checkpoint:
    """Read config.json and the headers of all weight files, or those of a GGUF model. `rope_scaling`, such as "yarn:4", replaces the
    scaling of config.json. `path`: a directory, or a GGUF file; `adapters` are merged into its weights, in their order.

    Raises QwenExportError. The values of the head are read where config.json ties it to the embedding and the files have both."""
    found = _opened(Path(path), rope_scaling)
    if not adapters:
        return found
    weights, config, notes = merged(found.weights, found.config, adapters)
    return replace(found, config=config, logical=weights, notes=(*found.notes, *notes), adapters=tuple(adapters))


def _opened(directory: Path, rope_scaling: str | None) -> Checkpoint:
    files = gguf_files(directory)
    if files:
        model = read_model(files, rope_scaling)
        return Checkpoint(directory, model.config, model.parts, rope_scaling, model.notes, model.weights, model.text)
    if not directory.is_dir():
        raise CheckpointError(
            "the checkpoint is not a directory", where=str(directory), fix="Give the directory that holds config.json, or a GGUF file."
        )
    if not (directory / "config.json").exists():
        refuse_adapter(directory)
    config = load_config(directory, rope_scaling)
    if not config.quantization and (directory / _MODELOPT).exists():
        settings = {"quant_method": "modelopt"} | read_json_object(directory / _MODELOPT, "quantization settings")
        config = replace(config, quantization=settings)
    stored, notes = read_tensors(directory)
    tensors, renamed = released_names(stored, config.text_prefix)
    tied, head_notes = decide_head(config, tensors)
    draft_layers, draft_notes = decide_draft_head(config, tensors)
    config = replace(config, text=replace(config.text, tie_word_embeddings=tied, mtp_num_hidden_layers=draft_layers))
    return Checkpoint(directory, config, tensors, rope_scaling, (*notes, *renamed, *head_notes, *draft_notes))
