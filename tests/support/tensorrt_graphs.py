"""The graphs that TensorRT compiles, as a bundle that ONNX Runtime runs on the CPU: they are standard ONNX, so their numbers can be proven
without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qwen_export.building.build_plan import plan_build
from qwen_export.building.emission import write_files, write_manifest
from qwen_export.building.lower_graphs import lower
from qwen_export.building.staging import staged_directory
from qwen_export.building.static_plan import StaticOptions
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.runtimes import load


def bundle_on_cpu(checkpoint: Path, output: Path, precision: str = "fp32", options: StaticOptions | None = None, **wishes: Any) -> Path:
    """Lower as for `--target tensorrt-rtx`, and leave the graphs ONNX. The LM head's top-k outputs stay."""
    source = open_checkpoint(checkpoint)
    plan = plan_build(source, "tensorrt-rtx", "cuda", precision, options=options, **wishes)
    on_cpu = replace(
        plan, engine=None, device="cpu", target=replace(plan.target, backend="onnxruntime", minimum_backend="1.31.0", engines=False)
    )
    with staged_directory(output, replace=True, keep=()) as staging:
        models = lower(source, plan)
        files = write_files(source, on_cpu, models, staging, lambda *_: None, None, None)
        write_manifest(source, on_cpu, models, files, {}, staging)
    return output


def error_of_calls(checkpoint: Path, bundle: Path, vocabulary: int) -> float:
    """The largest error of the logits through a prompt of several chunks, steps, a verify of which two tokens are kept, and steps behind
    it."""
    ids = np.random.default_rng(0).integers(0, vocabulary, 150).tolist()
    decoder = load(bundle, threads=1).decoder()
    rows = [decoder.prefill(ids[:140]).copy(), *(decoder.step([token])[0].copy() for token in ids[140:144])]
    rows += list(decoder.verify(ids[144:148]).copy())
    decoder.accept(2)
    rows += [decoder.step([token])[0].copy() for token in ids[146:150]]
    expected = EagerSequence(load_decoder(open_checkpoint(checkpoint)), 256).read(ids)
    places = [139, 140, 141, 142, 143, 144, 145, 146, 147, 146, 147, 148, 149]
    return float(np.abs(np.stack(rows) - expected[places]).max())
