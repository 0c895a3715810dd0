"""The eager decoder and draft head with a checkpoint's weights, in fp32: the reference of `verify`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch

from qwen_export.graphs.checkpoint.directory import Checkpoint
from qwen_export.graphs.checkpoint.names import check_tensors
from qwen_export.graphs.checkpoint.reader import CheckpointReader
from qwen_export.graphs.models.decoder import Decoder
from qwen_export.graphs.models.mtp import MtpHead


def load_decoder(checkpoint: Checkpoint) -> Decoder:
    """Memory: four bytes per parameter. Every weight passes the reader's checks."""
    check_tensors(checkpoint, mtp=False)
    with torch.device("meta"):
        model = Decoder(checkpoint.config.text)
    return _filled(model, checkpoint)


def load_mtp(checkpoint: Checkpoint, decoder: Decoder, draft_vocab: int) -> MtpHead:
    """The draft head beside a loaded decoder, with which it shares embedding and LM head."""
    check_tensors(checkpoint)
    with torch.device("meta"):
        model = MtpHead(checkpoint.config.text, draft_vocab)
    head = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
    shared = {"embed_tokens.weight": decoder.embed_tokens.weight, "draft_head.weight": head.weight[:draft_vocab]}
    return _filled(model, checkpoint, shared)


Module = TypeVar("Module", bound=torch.nn.Module)


def _filled(model: Module, checkpoint: Checkpoint, shared: Mapping[str, torch.Tensor] | None = None) -> Module:
    weights = dict(shared or {})
    with CheckpointReader(checkpoint) as reader:
        for name, parameter in model.named_parameters():
            if name not in weights:
                weights[name] = torch.from_numpy(np.ascontiguousarray(reader.rows(name, 0, parameter.shape[0])))
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(False)
