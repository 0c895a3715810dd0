"""Weights that stay in the checkpoint: the graph points into its files instead of a copy.

That needs a weight whose stored bytes are those of the graph: no fold, no dequantization, the same element type. The others go to the
bundle's own file. Instead of each file that is referred to the bundle has a note of one line, since ONNX Runtime requires a file that
exists and never reads one outside the graph's directory; the runtime maps the file and hands over its memory. What is referred to is not
read during the build, so its values are not checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from qwen_export.element_types import BY_SAFETENSORS
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.formats.logical_tensor import PLAIN_TYPES
from qwen_export.graphs.checkpoint.formats.plain_tensor import PlainTensor
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo
from qwen_export.graphs.checkpoint.tensor_names import stored_name
from qwen_export.graphs.weights.expression import FirstRows, Reshaped, StoredWeight, Weight
from qwen_export.graphs.weights.weight_writer import external, lazy_weights
from qwen_export.manifest import Reference


def refer_to_checkpoint(models: Sequence[ir.Model], checkpoint: Checkpoint, bundle: Path) -> dict[str, Reference]:
    """Turn every weight of the graphs that can stay in the checkpoint into external data there, and write the notes into `bundle`. Returns
    the files by the names of their notes; weights that stay lazy are for `write_weights`."""
    references: dict[str, Reference] = {}
    for value, weight in lazy_weights(models):
        info = _as_stored(weight, checkpoint)
        if info is None:
            continue
        note = f"{info.file.name}.reference"
        if note not in references:
            path, stat = info.file.resolve(), info.file.stat()
            references[note] = Reference(str(path), stat.st_size, stat.st_mtime_ns)
            (bundle / note).write_text(f"{path}\n", encoding="utf-8")
        value.const_value = external(bundle / note, info.offset, weight, value.name or "")
    return references


def _as_stored(weight: Weight, checkpoint: Checkpoint) -> TensorInfo | None:
    """The stored tensor that has the weight's bytes, at an offset that its elements can be read from."""
    while isinstance(weight, Reshaped | FirstRows):  # the front of the same bytes
        weight = weight.of
    if not isinstance(weight, StoredWeight):
        return None
    stored = checkpoint.weights[stored_name(checkpoint.config, weight.name)]
    if (
        not isinstance(stored, PlainTensor)
        or stored.dtype not in PLAIN_TYPES
        or ir.DataType[BY_SAFETENSORS[stored.dtype].onnx] != weight.dtype
    ):
        return None
    return stored.info if stored.info.offset % weight.dtype.itemsize == 0 else None
