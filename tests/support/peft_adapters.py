"""Adapters made and merged by PEFT on small models of transformers, as references for the tests."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

IDS = np.random.default_rng(0).integers(0, 400, 24).tolist()


def model_of(checkpoint: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype=torch.float32, local_files_only=True).eval()


def make_adapter(checkpoint: Path, out: Path, seed: int = 1, **settings: Any) -> Path:
    """An adapter with random matrices, magnitudes and saved modules, written by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model_of(checkpoint), LoraConfig(task_type="CAUSAL_LM", **settings))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.data *= 1 + 0.2 * noise
            else:
                parameter.data += 0.08 * noise
        model.save_pretrained(str(out))
    return out


def with_adapter(checkpoint: Path, adapter: Path, *others: Path, scale: float = 1.0) -> Any:
    """PEFT's model with adapters that are all active, not merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(model_of(checkpoint), str(adapter)).eval()
        names = ["default"]
        for i, other in enumerate(others):
            names.append(f"other{i}")
            model.load_adapter(str(other), names[-1])
        model.base_model.set_adapter(names)
        if scale != 1:
            for module in model.modules():
                if hasattr(module, "scale_layer"):
                    module.scale_layer(scale)
    return model.eval()


def merged_weights(model: Any) -> dict[str, npt.NDArray[np.float32]]:
    """Of `merge_and_unload`, by the names of the modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    return {name.removeprefix("model."): value.float().numpy() for name, value in merged.state_dict().items()}


def logits(model: Any) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float().numpy()
