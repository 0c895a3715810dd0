"""The eager decoder with a checkpoint's weights, in fp32: the reference of `verify`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from qwen_export.graphs.checkpoint.directory import Checkpoint
from qwen_export.graphs.checkpoint.names import StoredLayout, check_tensors
from qwen_export.graphs.checkpoint.reader import CheckpointReader
from qwen_export.graphs.models.decoder import Decoder
from qwen_export.graphs.quantization.methods import quantize
from qwen_export.graphs.quantization.packing import Floats, dequantize
from qwen_export.graphs.quantization.plan import PrecisionPlan
from qwen_export.graphs.weights.layout import parameter_weight


def load_decoder(checkpoint: Checkpoint, quantization: PrecisionPlan | None = None) -> Decoder:
    """Memory: four bytes per parameter. Every weight passes the reader's checks. With a precision plan, matrices have the values that their
    codes stand for."""
    check_tensors(checkpoint)
    config, stored = checkpoint.config.text, StoredLayout.of(checkpoint)
    with torch.device("meta"):
        model = Decoder(config).eval()
    with CheckpointReader(checkpoint) as reader:
        weights = {}
        for name, parameter in model.named_parameters():
            weight = parameter_weight(config, stored, name, tuple(parameter.shape), ir.DataType.FLOAT)
            values = _rounded(weight.evaluate(reader).astype(np.float32, copy=False), name, quantization)
            weights[name] = torch.from_numpy(np.ascontiguousarray(values))
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False)


def _rounded(values: Floats, name: str, quantization: PrecisionPlan | None) -> Floats:
    chosen = quantization.of(name) if quantization else None
    if chosen is None or chosen.quant is None:
        return values
    matrix = values.reshape(-1, values.shape[-1])
    return dequantize(chosen.quant, *quantize(chosen.quant, matrix, chosen.method)).reshape(values.shape)
