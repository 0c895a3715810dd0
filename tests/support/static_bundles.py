"""Bundles with static shapes: the reference they are compared with, and their files in ONNX Runtime without our runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from qwen_export.manifest import load_manifest
from qwen_export.runtimes.decoding.decoder import Decoder
from tests.support.graph_driver import GraphDriver
from tests.support.references import reference_model
from tests.test_parity import Logits

Reference = Callable[[list[int]], Logits]


def reference_logits(checkpoint: Path) -> Reference:
    """transformers' logits f32[T,V] of a text."""
    model = reference_model(checkpoint)

    @torch.no_grad()
    def logits(ids: list[int]) -> Logits:
        return model(torch.tensor([ids])).logits[0].numpy()

    return logits


def unoptimized(bundle: Path) -> GraphDriver:
    """The files as they are on ONNX Runtime's CPU provider: no optimizer that could replace a node by another."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    names = ("decoder", "prefill")
    graphs = {
        n: ort.InferenceSession(str(bundle / load_manifest(bundle).graphs[n].file), options, providers=["CPUExecutionProvider"])
        for n in names
    }
    outputs = {name: [output.name for output in graph.get_outputs()] for name, graph in graphs.items()}
    return GraphDriver(bundle, lambda name, feeds: dict(zip(outputs[name], graphs[name].run(None, feeds), strict=True)))


def steps_around_a_snapshot(machine: Decoder, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the step behind `ids[:30]`, at once and after the sequence went to another text and came back."""
    machine.prefill(ids[:30])
    snapshot = machine.snapshot()
    first = machine.step([ids[30]])[0].copy()
    machine.reset()
    machine.prefill(ids[5:])
    machine.restore(snapshot)
    return first, machine.step([ids[30]])[0]
