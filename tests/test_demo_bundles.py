"""The trained demo checkpoints through the compiler: the compiled model is as good a model as the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from qwen_export import build
from qwen_export.errors import UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.runtimes import load

HELD_OUT = Path(__file__).parent / "data" / "held_out.py.txt"


def _perplexity(logits: npt.NDArray[np.float32], ids: list[int]) -> float:
    x = logits[:-1].astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    log_probs = x[np.arange(len(x)), ids[1:]] - np.log(np.exp(x).sum(axis=1))
    return float(np.exp(-log_probs.mean()))


def _compiled(bundle: Path) -> tuple[float, list[int]]:
    """Perplexity of the bundle on the held-out code, in four calls, and the tokens."""
    model = load(bundle, threads=2)
    ids = model.tokenizer.encode(HELD_OUT.read_text())[:400]
    decoder = model.decoder()
    return _perplexity(np.concatenate([decoder.read(ids[i : i + 100]).copy() for i in range(0, len(ids), 100)]), ids), ids


def _transformers(checkpoint: Path, ids: list[int]) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype=torch.float32).eval()
    with torch.no_grad():
        return _perplexity(model(torch.tensor([ids])).logits[0].numpy(), ids)


def test_perplexity_of_the_dense_model(demo_checkpoint: Path, demo_bundle: Path) -> None:
    """Code of our own, which no package of the training corpus holds; a random model would be at the size of the vocabulary, 8192."""
    compiled, ids = _compiled(demo_bundle)
    eager = _perplexity(EagerSequence(load_decoder(open_checkpoint(demo_checkpoint)), len(ids)).read(ids), ids)
    assert abs(compiled / eager - 1) < 1e-3
    assert abs(compiled / _transformers(demo_checkpoint, ids) - 1) < 1e-3
    assert compiled < 60


def test_perplexity_of_the_mixture_of_experts(demo_moe_checkpoint: Path, tmp_path: Path) -> None:
    """Skipped while no target lowers mixture-of-experts layers."""
    try:
        bundle = build(demo_moe_checkpoint, tmp_path / "moe")
    except UnsupportedError as refusal:
        pytest.skip(refusal.got)
    compiled, ids = _compiled(bundle)
    assert abs(compiled / _transformers(demo_moe_checkpoint, ids) - 1) < 1e-3
    assert compiled < 60
