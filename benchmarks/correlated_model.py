"""A checkpoint of random weights that is as hard to quantize as trained ones: its activations are correlated, and some channels stand out.

    .venv/bin/python benchmarks/correlated_model.py OUTPUT [--seed 0]

The recipe, in the shape of the dense demo:

* the embedding is of rank 24 with a falling spectrum, plus a tenth of noise: channels of the residual stream are correlated;
* 6 channels of the stream are 20 times as large as the others, in every norm's weight, as outlier channels of trained models are;
* matrices are of Student's t distribution with 5 degrees of freedom, their columns scaled by a log-normal factor (deviation 0.5): the
  columns of a block differ, and single weights stand out;
* the head is one of its own, with logits of deviation 2.5: the model prefers some tokens, and its own texts have a perplexity.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ROOT / "examples" / "demo-dense"
RANK, NOISE, OUTLIERS, FACTOR, FREEDOM, COLUMNS, LOGITS = 24, 0.1, 6, 20.0, 5, 0.5, 2.5


def write_model(output: Path, seed: int = 0) -> Path:
    import ml_dtypes

    output.mkdir(parents=True, exist_ok=True)
    config = json.loads((SHAPE / "config.json").read_text())
    config["tie_word_embeddings"] = False
    for path in SHAPE.glob("*.json*"):
        (output / path.name).write_bytes(path.read_bytes())
    (output / "chat_template.jinja").write_bytes((SHAPE / "chat_template.jinja").read_bytes())
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: np.asarray(value, np.float32) for name, value in load_file(SHAPE / "model.safetensors").items()}
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    channels = np.random.default_rng(seed).choice(tensors[embedding].shape[1], OUTLIERS, replace=False)
    made = {name: _values(name, value, channels, seed) for name, value in tensors.items()}
    made["lm_head.weight"] = _head(made[embedding].shape, channels, seed)
    save_file({name: value.astype(ml_dtypes.bfloat16) for name, value in made.items()}, output / "model.safetensors", {"format": "pt"})
    return output


def _values(name: str, trained: np.ndarray, channels: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("embed_tokens.weight"):
        V, H = trained.shape
        low = rng.standard_normal((V, RANK)) * np.arange(1, RANK + 1) ** -0.5 @ rng.standard_normal((RANK, H))
        return low / low.std() + NOISE * rng.standard_normal((V, H))
    if trained.ndim == 2 and not name.endswith("conv1d.weight"):
        N, K = trained.shape
        values = rng.standard_t(FREEDOM, (N, K)) * np.exp(COLUMNS * rng.standard_normal(K))
        return 0.8 * values / values.std() / K**0.5 / _outlier_gain(name, K)
    if name.endswith("layernorm.weight"):
        weight = 0.1 * rng.standard_normal(trained.shape)
        weight[channels] += FACTOR - 1
        return weight
    return trained  # decays, convolutions, norms of heads: what makes a state remember


def _outlier_gain(name: str, K: int) -> float:
    """The inputs of these are behind a norm with outlier channels, which make a row's sum larger."""
    behind = ("in_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    return (1 + OUTLIERS * (FACTOR**2 - 1) / K) ** 0.5 if any(part in name for part in behind) else 1.0


def _head(shape: tuple[int, ...], channels: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 1])
    return LOGITS * rng.standard_normal(shape) / shape[1] ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(write_model(options.output, options.seed))


if __name__ == "__main__":
    main()
