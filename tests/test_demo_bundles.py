"""The trained demo checkpoint through the compiler: the compiled model is as good a model as the eager one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwen_export.graphs.checkpoint.directory import open_checkpoint
from qwen_export.graphs.models.eager import EagerSequence
from qwen_export.graphs.models.load import load_decoder
from qwen_export.runtimes import load

HELD_OUT = Path(__file__).parent / "data" / "held_out.py.txt"


def _perplexity(logits: npt.NDArray[np.float32], ids: list[int]) -> float:
    x = logits[:-1].astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    log_probs = x[np.arange(len(x)), ids[1:]] - np.log(np.exp(x).sum(axis=1))
    return float(np.exp(-log_probs.mean()))


def test_perplexity_of_the_compiled_model_is_that_of_the_eager_one(demo_checkpoint: Path, demo_bundle: Path) -> None:
    """Code of our own, which no package of the training corpus holds; a random model would be at the size of the vocabulary, 8192."""
    model = load(demo_bundle, threads=2)
    ids = model.tokenizer.encode(HELD_OUT.read_text())[:400]
    decoder = model.decoder()
    compiled = _perplexity(np.concatenate([decoder.read(ids[i : i + 100]).copy() for i in range(0, len(ids), 100)]), ids)
    eager = _perplexity(EagerSequence(load_decoder(open_checkpoint(demo_checkpoint)), len(ids)).read(ids), ids)
    assert abs(compiled / eager - 1) < 1e-3
    assert compiled < 60
