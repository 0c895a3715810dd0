"""The eager decoder with a checkpoint's weights, in fp32: the reference of `verify`."""

from __future__ import annotations

import numpy as np
import torch

from qwen_export.graphs.checkpoint.directory import Checkpoint
from qwen_export.graphs.checkpoint.names import check_tensors
from qwen_export.graphs.checkpoint.reader import CheckpointReader
from qwen_export.graphs.models.decoder import Decoder


def load_decoder(checkpoint: Checkpoint) -> Decoder:
    """Memory: four bytes per parameter. Every weight passes the reader's checks."""
    check_tensors(checkpoint)
    with torch.device("meta"):
        model = Decoder(checkpoint.config.text).eval()
    with CheckpointReader(checkpoint) as reader:
        weights = {
            name: torch.from_numpy(np.ascontiguousarray(reader.rows(name, 0, parameter.shape[0])))
            for name, parameter in model.named_parameters()
        }
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False)
