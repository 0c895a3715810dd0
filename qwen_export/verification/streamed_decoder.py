"""The eager decoder in the memory of one layer: each part gets its weights when it is called, and gives them back when it is done.

One call of the model reads the checkpoint once. The embedding reads the rows of the tokens, and the LM head multiplies block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.tensor_names import StoredLayout, check_tensors
from qwen_export.graphs.models.load_model import parameter_values
from qwen_export.graphs.models.text_model import TextModel
from qwen_export.graphs.quantization.calibrated_codes import with_codes
from qwen_export.graphs.quantization.precision_plan import PrecisionPlan
from qwen_export.graphs.weights.expression import Weight
from qwen_export.graphs.weights.stored_layout import parameter_weight

Report = Callable[[int, int], None]

HEAD_ROWS = 16384
"""Rows of the LM head that are in memory at a time."""
_EMBEDDING_ROWS = 64
"""Rows of the embedding that are read together: formats pack some rows into one panel."""


def streamed_decoder(checkpoint: Checkpoint, quantization: PrecisionPlan | None = None, report: Report | None = None) -> TextModel:
    """As `load_model.load_decoder`, with the same values. `report` gets the layer that is read, from 1, and how many there are."""
    check_tensors(checkpoint, mtp=False)
    with torch.device("meta"):
        model = TextModel(checkpoint.config.text)
    values = _Values(checkpoint, quantization)
    model.eval().requires_grad_(False)
    head = "embed_tokens.weight" if model.lm_head is None else "lm_head.weight"
    shape = (checkpoint.config.text.vocab_size, checkpoint.config.text.hidden_size)
    model.embed_tokens = _StreamedEmbedding(values, "embed_tokens.weight", shape)  # type: ignore[assignment]
    model.lm_head = _StreamedHead(values, head, shape)  # type: ignore[assignment]
    count = len(model.layers)
    for i, layer in enumerate(model.layers):
        _stream(layer, f"layers.{i}.", values, partial(report, i + 1, count) if report else lambda: None)
    _stream(model.norm, "norm.", values, lambda: None)
    return model


class _Values:
    """Values of parameters in fp32, or what a precision plan makes of them."""

    def __init__(self, checkpoint: Checkpoint, quantization: PrecisionPlan | None) -> None:
        self._checkpoint, self._quantization = checkpoint, quantization
        self._stored = StoredLayout.of(checkpoint)

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        return parameter_weight(self._checkpoint.config.text, self._stored, name, shape, ir.DataType.FLOAT)

    def read(self, weight: Weight, start: int | None = None, stop: int | None = None) -> Tensor:
        """All of a weight, or rows of it."""
        with CheckpointReader(self._checkpoint) as reader:
            values = with_codes(reader, self._quantization.codes if self._quantization else None)
            return torch.from_numpy(parameter_values(weight, values, self._quantization, start, stop))


def _stream(module: nn.Module, prefix: str, values: _Values, starts: Callable[[], object]) -> None:
    """Fill the module before each of its calls, and empty it behind them."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}

    def fill(_module: nn.Module, _arguments: Any) -> None:
        starts()
        weights = {name: values.read(values.weight(prefix + name, shape)) for name, shape in shapes.items()}
        module.load_state_dict(weights, strict=True, assign=True)

    def empty(_module: nn.Module, _arguments: Any, _result: Any) -> None:
        module.to(device="meta")

    # Hooks of observers come after the first and before the last.
    module.register_forward_pre_hook(fill, prepend=True)
    module.register_forward_hook(empty)


class _StreamedEmbedding(nn.Module):
    def __init__(self, values: _Values, name: str, shape: tuple[int, int]) -> None:
        super().__init__()
        self._values, self._weight, self._shape = values, values.weight(name, shape), shape
        self.weight = torch.empty(shape, device="meta")
        """For its element type."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids i64[B,T] -> f32[B,T,H]."""
        result = torch.empty(*ids.shape, self._shape[1])
        blocks = ids // _EMBEDDING_ROWS
        for block in blocks.unique().tolist():
            start = block * _EMBEDDING_ROWS
            rows = self._values.read(self._weight, start, min(self._shape[0], start + _EMBEDDING_ROWS))
            there = blocks == block
            result[there] = rows[ids[there] - start]
        return result


class _StreamedHead(nn.Module):
    def __init__(self, values: _Values, name: str, shape: tuple[int, int]) -> None:
        super().__init__()
        self._values, self._weight, self._rows = values, values.weight(name, shape), shape[0]

    def forward(self, hidden: Tensor) -> Tensor:
        """f32[B,T,H] -> logits f32[B,T,V]."""
        starts = range(0, self._rows, HEAD_ROWS)
        parts = [(start, min(self._rows, start + HEAD_ROWS)) for start in starts]
        return torch.cat([nn.functional.linear(hidden, self._values.read(self._weight, *part)) for part in parts], dim=-1)
