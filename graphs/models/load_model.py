"""The eager decoder and draft head with a checkpoint's weights, in fp32: the reference of `verify`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, cast

import numpy as np
import onnx_ir as ir
import torch

from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.tensor_names import StoredLayout, check_tensors
from qwen_export.graphs.models.draft_head_model import MtpHead
from qwen_export.graphs.models.text_model import TextModel
from qwen_export.graphs.models.vision_model import VisionModel
from qwen_export.graphs.quantization.calibrated_codes import with_codes
from qwen_export.graphs.quantization.fp8 import rounded
from qwen_export.graphs.quantization.fp8_blocks import Fp8Source, Fp8Values
from qwen_export.graphs.quantization.packing import Floats, dequantize
from qwen_export.graphs.quantization.precision_plan import FP8, FP8_ROW, GroupFormat, PrecisionPlan
from qwen_export.graphs.quantization.scale_search import quantize
from qwen_export.graphs.vision_config import parse_vision
from qwen_export.graphs.weights.expression import TensorSource, Weight
from qwen_export.graphs.weights.stored_layout import parameter_weight


def load_decoder(checkpoint: Checkpoint, quantization: PrecisionPlan | None = None) -> TextModel:
    """Memory: four bytes per parameter. Every weight passes the reader's checks. With a precision plan, matrices have the values that their
    codes stand for."""
    check_tensors(checkpoint, mtp=False)
    with torch.device("meta"):
        model = TextModel(checkpoint.config.text)
    return _filled(model, checkpoint, quantization=quantization)


def load_mtp(checkpoint: Checkpoint, decoder: TextModel, draft_vocab: int, quantization: PrecisionPlan | None = None) -> MtpHead:
    """The draft head beside a loaded decoder, with which it shares embedding and LM head."""
    check_tensors(checkpoint)
    with torch.device("meta"):
        model = MtpHead(checkpoint.config.text, draft_vocab)
    head = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
    shared = {"embed_tokens.weight": decoder.embed_tokens.weight, "draft_head.weight": head.weight[:draft_vocab]}
    return _filled(model, checkpoint, shared, quantization)


def load_tower(checkpoint: Checkpoint, quantization: PrecisionPlan | None = None) -> VisionModel:
    """The vision tower, likewise."""
    config = checkpoint.config
    tower = parse_vision(config.vision or {}, config.text.hidden_size, str(checkpoint.path))
    check_tensors(checkpoint, mtp=False, vision=tower)
    with torch.device("meta"):
        model = VisionModel(tower)
    return _filled(model, checkpoint, quantization=quantization)


Module = TypeVar("Module", bound=torch.nn.Module)


def _filled(
    model: Module, checkpoint: Checkpoint, shared: Mapping[str, torch.Tensor] | None = None, quantization: PrecisionPlan | None = None
) -> Module:
    weights, stored = dict(shared or {}), StoredLayout.of(checkpoint)
    with CheckpointReader(checkpoint) as reader:
        values = with_codes(reader, quantization.codes if quantization else None)
        for name, parameter in model.named_parameters():
            if name not in weights:
                weight = parameter_weight(checkpoint.config.text, stored, name, tuple(parameter.shape), ir.DataType.FLOAT)
                # The patch embedding is stored as a convolution.
                weights[name] = torch.from_numpy(parameter_values(weight, values, quantization)).reshape(parameter.shape)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def parameter_values(
    weight: Weight, source: TensorSource, quantization: PrecisionPlan | None, start: int | None = None, stop: int | None = None
) -> Floats:
    """The values of a weight in fp32, or of its rows `start` to `stop`; with a precision plan those that its codes stand for."""
    chosen = quantization.of_weight(weight) if quantization else GroupFormat()
    if chosen.format == FP8 and chosen.block != FP8_ROW and not chosen.given:
        source = Fp8Values(cast(Fp8Source, source), kept=False)
    values = weight.evaluate(source) if start is None or stop is None else weight.rows(source, start, stop)
    return np.ascontiguousarray(_rounded(values.astype(np.float32, copy=False), chosen))


def _rounded(values: Floats, chosen: GroupFormat) -> Floats:
    matrix = values.reshape(-1, values.shape[-1])
    if chosen.format == FP8 and chosen.block == FP8_ROW:
        return rounded(matrix).reshape(values.shape)
    if chosen.quant is None or chosen.given:
        return values
    return dequantize(chosen.quant, *quantize(chosen.quant, matrix, chosen.method, chosen.search)).reshape(values.shape)
