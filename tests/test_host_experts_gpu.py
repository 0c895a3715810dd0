"""Experts in the memory of the host, read by the kernels of a GPU: the same bits as from its own memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen_export import build
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import load
from qwen_export.runtimes.memory import memory_rates
from qwen_export.runtimes.memory.mapped_weights import weight_bytes
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize

pytestmark = pytest.mark.gpu


def logits(bundle: Path, budget: int | None) -> list[np.ndarray]:
    """Of a prompt, recorded steps and a verify."""
    prompt = np.random.default_rng(1).integers(0, 4000, 300).tolist()
    with load(bundle, max_context=512, weight_budget=budget) as model:
        decoder = model.decoder(drafts=True)
        seen = [np.array(decoder.prefill(prompt))]
        seen += [np.array(decoder.step([token])) for token in (1, 2, 3)]
        seen.append(np.array(decoder.verify([4, 5, 6]).array))
        return seen


def test_where_experts_are_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_rates, "host_rate", lambda: 1.0)  # experts so small are faster on any CPU
    widths = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "shared_expert_intermediate_size": 32}
    config = tiny_config(vision=False, moe=True, vocab_size=4096, **widths)
    checkpoint = synthesize(config, tmp_path / "checkpoint")
    plain = build(checkpoint, tmp_path / "plain", device="cuda", precision="int4")
    host = build(checkpoint, tmp_path / "host", device="cuda", precision="int4", host_experts=True)
    graphs = load_manifest(host).graphs.values()
    assert all(graph.bound for graph in graphs)
    others = sum(weight_bytes(weight) for graph in graphs for weight in graph.weights if weight.name not in graph.bound)
    expected = logits(plain, None)
    for budget in (None, others):
        for have, want in zip(logits(host, budget), expected, strict=True):
            np.testing.assert_array_equal(have, want)
