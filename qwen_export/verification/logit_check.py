"""Proof that a bundle is the model it was built from.

The compiled artifact is run through its own runtime and compared with the eager modules in fp32, and with transformers where that is
installed: a prompt in one call, the same prompt in chunks, token by token, after a rewind, and greedy continuation. The result is stored
in the bundle's manifest. Where weights are quantized, the reference of these runs has the values that the codes stand for, so that a wrong
code shows however coarse the format is; what the format costs is a check of its own, against the weights of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_export.errors import VerifyError
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint, open_checkpoint
from qwen_export.graphs.checkpoint.tensor_names import StoredLayout, stored_tensors
from qwen_export.graphs.quantization.kept_grids import keep_stored
from qwen_export.graphs.quantization.precision_plan import QUANTIZED, PrecisionPlan
from qwen_export.manifest import MANIFEST, ROPE_SCALING, Manifest, load_manifest
from qwen_export.plugins.native.native_search import find_search
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.model import load
from qwen_export.targets import TARGETS

# Largest allowed |error| of a logit, in standard deviations of the reference's logits. transformers itself, in fp16 and bf16, is off by
# 0.05 and 0.34 on the 0.8B shape.
TOLERANCE = {"fp32": 1.5e-4, "tf32": 0.01, "fp16": 0.08, "bf16": 0.5, "int8": 0.5, "int4": 0.5, "fp8": 0.5}
# Quantized: the largest error is a matter of luck, so the root mean square decides, in the same unit. "activations": against the same
# rounded weights; else against those of the checkpoint.
RMS_TOLERANCE = {"activations": 0.1, "int8": 0.15, "int4": 0.85, "fp8": 0.5}
PROMPT_TOKENS, GREEDY_TOKENS = 48, 24
_CAPACITY = 128

Logits = npt.NDArray[np.float32]
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison. `max_abs_error` in logits; None for a check that counts instead."""

    name: str
    against: str
    max_abs_error: float | None
    tolerance: float | None
    passed: bool
    note: str = ""


def verify(bundle: str | Path, reference: str | Path, report: Report | None = None) -> dict[str, Any]:
    """Run every check; the result has `passed`, `logit_std` and `checks`, and is written to the bundle's manifest.

    Needs memory for the bundle and for the checkpoint in fp32. Raises VerifyError when the checkpoint is another model."""
    say = report or (lambda name: None)
    directory = Path(bundle)
    manifest = load_manifest(directory)
    source = reference_checkpoint(manifest, reference)
    say("loading the bundle")
    model = load(directory, max_context=min(_CAPACITY, manifest.max_context))
    ids = np.random.default_rng(0).integers(0, manifest.model["vocab_size"], PROMPT_TOKENS).tolist()
    say("eager reference")
    eager = _eager(source)
    expected = eager(ids)
    scale = float(expected.std())
    limit = TOLERANCE[arithmetic(manifest, manifest.target.precision)] * scale
    decoder = model.decoder()
    quantized = manifest.target.precision in QUANTIZED

    def compared(name: str, against: str, got: Logits, wanted: Logits, rounding: str) -> Check:
        return _rms(name, against, got, wanted, RMS_TOLERANCE[rounding]) if quantized else _logits(name, against, got, wanted, limit)

    checks: list[Check] = []
    against = "eager"
    if quantized:
        checks.append(compared("quantization", against, _one_call(decoder, ids), expected, manifest.target.precision))
        del eager
        say("eager reference with the quantized weights")
        eager, against = _eager(source, reference_plan(source, manifest.precision_plan)), "eager, quant."
        expected = eager(ids)
    checks += [compared(name, against, run(decoder, ids), expected, "activations") for name, run in _announced(say)]
    checks.append(_rewind(decoder, ids))
    say("greedy continuation")
    checks.append(_greedy(decoder, eager, ids, limit))
    del eager  # transformers wants the memory
    # transformers may take the codes of a quantized checkpoint for weights without a word.
    if importlib.util.find_spec("transformers") and not source.config.quantization:
        say("transformers")
        theirs = _transformers(source, ids, ROPE_SCALING in manifest.source)
        checks.append(compared("prefill", "transformers", _one_call(decoder, ids), theirs, manifest.target.precision))
    result = {
        "passed": all(check.passed for check in checks),
        "when": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "precision": manifest.target.precision,
        "logit_std": scale,
        "checks": [dataclasses.asdict(check) for check in checks],
    }
    updated = dataclasses.replace(manifest, verification=result)
    temporary = directory / f".{MANIFEST}.{os.getpid()}"
    temporary.write_text(updated.to_json(), encoding="utf-8")
    temporary.replace(directory / MANIFEST)
    return result


def reference_checkpoint(manifest: Manifest, reference: str | Path) -> Checkpoint:
    """The checkpoint as the bundle was built from it. Raises VerifyError when it is another model."""
    source = open_checkpoint(reference, manifest.source.get(ROPE_SCALING))
    if source.config.text.to_json() != manifest.model:
        raise VerifyError(
            "the reference is not the checkpoint that the bundle was built from", where=str(reference), fix="Give that checkpoint."
        )
    return source


def _one_call(decoder: Decoder, ids: list[int]) -> Logits:
    decoder.reset()
    return decoder.read(ids).copy()


def _chunked(decoder: Decoder, ids: list[int]) -> Logits:
    """Chunks of 1, 2, 3, ... tokens: every split falls somewhere else in the convolution's window."""
    decoder.reset()
    parts, start, size = [], 0, 1
    while start < len(ids):
        parts.append(decoder.read(ids[start : start + size]).copy())
        start, size = start + size, size + 1
    return np.concatenate(parts)


def _token_by_token(decoder: Decoder, ids: list[int]) -> Logits:
    decoder.reset()
    return np.concatenate([decoder.step([token]).copy() for token in ids])


_RUNS: tuple[tuple[str, Callable[[Decoder, list[int]], Logits]], ...] = (
    ("prefill", _one_call),
    ("chunked prefill", _chunked),
    ("decode", _token_by_token),
)


def _announced(say: Report) -> Any:
    for name, run in _RUNS:
        say(name)
        yield name, run


def arithmetic(manifest: Manifest, activations: str) -> str:
    """The key of the tolerance for a bundle: of fp32, what the target's products make of it."""
    return TARGETS[manifest.target.name].fp32_products if activations == "fp32" else activations


def _logits(name: str, against: str, got: Logits, expected: Logits, limit: float) -> Check:
    error = float(np.abs(got - expected).max())
    return Check(name, against, error, limit, bool(error <= limit))


def _rms(name: str, against: str, got: Logits, expected: Logits, limit: float) -> Check:
    error = got.astype(np.float64) - expected
    share = float(np.sqrt((error * error).mean()) / expected.std())
    largest = float(np.abs(error).max())
    return Check(name, against, None, None, share <= limit, f"rms error {share:.4f} of a deviation (limit {limit:.2f}), max {largest:.2e}")


def _rewind(decoder: Decoder, ids: list[int]) -> Check:
    """Read, rewind to the middle, read other text, restore a snapshot of the end: bit for bit what it was."""
    half = len(ids) // 2
    decoder.reset()
    decoder.prefill(ids[:half])
    middle = decoder.mark()
    first = decoder.prefill(ids[half:]).copy()
    end = decoder.snapshot()
    decoder.rewind(middle)
    decoder.prefill(ids[: len(ids) - half])
    decoder.restore(end)
    decoder.rewind(middle)
    error = float(np.abs(decoder.prefill(ids[half:]) - first).max())
    return Check("snapshot, restore, rewind", "itself", error, 0.0, error == 0.0)


def _greedy(decoder: Decoder, eager: Callable[[list[int]], Logits], ids: list[int], limit: float) -> Check:
    """Greedy tokens of the bundle against the eager model on the same text; a difference counts only beyond the tolerance."""
    decoder.reset()
    logits, chosen = decoder.prefill(ids), []
    for _ in range(GREEDY_TOKENS):
        chosen.append(int(logits.argmax()))
        logits = decoder.step([chosen[-1]])[0]
    rows = eager([*ids, *chosen])[len(ids) - 1 : -1]
    gaps = rows.max(axis=1) - rows[np.arange(len(chosen)), chosen]
    ties, wrong = int(((gaps > 0) & (gaps <= 2 * limit)).sum()), int((gaps > 2 * limit).sum())
    return Check("greedy tokens", "eager", None, None, wrong == 0, f"{len(chosen)} tokens, {wrong} different, {ties} near-ties")


def _eager(source: Checkpoint, quantization: PrecisionPlan | None = None) -> Callable[[list[int]], Logits]:
    """The eager modules in fp32 with the checkpoint's weights, or what a plan makes of them: a function from token ids to logits [T,V]."""
    from qwen_export.graphs.models.eager_sequence import EagerSequence
    from qwen_export.graphs.models.load_model import load_decoder

    model = load_decoder(source, quantization)
    return lambda ids: EagerSequence(model, _CAPACITY).read(ids)


def reference_plan(source: Checkpoint, entries: dict[str, str]) -> PrecisionPlan:
    """The precision plan of a bundle that was built from `source`."""
    plan, search = PrecisionPlan.from_json(entries), find_search()
    if search is not None:
        plan = dataclasses.replace(plan, search=search)
    if not PrecisionPlan.keeps(entries):
        return plan
    return keep_stored(plan, source, [name for name, _ in stored_tensors(source.config.text, StoredLayout.of(source))])


def _transformers(source: Checkpoint, ids: list[int], scaled: bool) -> Logits:
    """Its logits; `scaled`: with the bundle's scaling of the rotary embedding in the place of that of config.json."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.from_pretrained(str(source.path), local_files_only=True)
        if scaled:
            rope = source.config.text.rope
            given = {
                "rope_type": rope.kind,
                "factor": rope.factor,
                "original_max_position_embeddings": rope.original_max_position_embeddings,
            }
            config.get_text_config().rope_parameters |= given
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(source.path), config=config, dtype=torch.float32, local_files_only=True
        ).eval()
        return model(torch.tensor([ids])).logits[0].numpy()


def as_lines(result: dict[str, Any]) -> list[str]:
    """One line per check, for people."""
    lines = [f"logits have a standard deviation of {result['logit_std']:.3f}"]
    for check in result["checks"]:
        error = (
            check["note"]
            if check["max_abs_error"] is None
            else f"max |error| {check['max_abs_error']:.2e} (limit {check['tolerance']:.1e})"
        )
        lines.append(f"  {'ok  ' if check['passed'] else 'FAIL'} {check['name']:26} against {check['against']:12} {error}")
    return lines


def dump(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1)
