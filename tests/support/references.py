"""Checkpoints in transformers."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration, Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration

from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint


def reference_model(checkpoint: Path) -> Any:
    """The checkpoint in transformers, fp32, every weight of it found."""
    config = open_checkpoint(checkpoint).config
    flat: Any = Qwen3_5MoeForCausalLM if config.text.is_moe else Qwen3_5ForCausalLM
    nested: Any = Qwen3_5MoeForConditionalGeneration if config.text.is_moe else Qwen3_5ForConditionalGeneration
    kind = flat if config.vision is None else nested
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, found = kind.from_pretrained(str(checkpoint), dtype=torch.float32, local_files_only=True, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    return model.eval()
