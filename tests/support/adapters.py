"""Adapters in PEFT's form, written without PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def write_adapter(out: Path, modules: Mapping[str, tuple[int, int]], seed: int = 0, strength: float = 0.1, **config: Any) -> Path:
    """Random matrices for modules such as "layers.0.mlp.up_proj", each given by its outputs and inputs."""
    rng, rank, tensors = np.random.default_rng(seed), config.get("r", CONFIG["r"]), {}
    for module, (rows, columns) in modules.items():
        prefix = f"base_model.model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = rng.normal(size=(rank, columns)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = (strength * rng.normal(size=(rows, rank))).astype(np.float32)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return out
