"""The eager decoder with a checkpoint's weights, in fp32: the reference of `verify`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from qwen_export.graphs.checkpoint.directory import Checkpoint
from qwen_export.graphs.checkpoint.names import StoredLayout, check_tensors
from qwen_export.graphs.checkpoint.reader import CheckpointReader
from qwen_export.graphs.models.decoder import Decoder
from qwen_export.graphs.weights.layout import parameter_weight


def load_decoder(checkpoint: Checkpoint) -> Decoder:
    """Memory: four bytes per parameter. Every weight passes the reader's checks."""
    check_tensors(checkpoint)
    config, stored = checkpoint.config.text, StoredLayout.of(checkpoint)
    with torch.device("meta"):
        model = Decoder(config).eval()
    with CheckpointReader(checkpoint) as reader:
        weights = {}
        for name, parameter in model.named_parameters():
            weight = parameter_weight(config, stored, name, tuple(parameter.shape), ir.DataType.FLOAT)
            weights[name] = torch.from_numpy(np.ascontiguousarray(weight.evaluate(reader)))
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False)
