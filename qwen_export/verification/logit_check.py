"""Proof that a bundle is the model it was built from.

The compiled artifact is run through its own runtime and compared with the eager modules in fp32, and with transformers where that is
installed: a prompt in one call, the same prompt in chunks, token by token, after a rewind, and greedy continuation; and the vision tower
with a prompt that holds pictures. The result is stored in the bundle's manifest. Where weights are quantized, the reference of these runs
has the values that the codes stand for, so that a wrong code shows however coarse the format is; what the format costs is a check of its
own, against the weights of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwen_export.building.build_plan import activation_precision
from qwen_export.cache_formats import CacheFormat
from qwen_export.downloads.local_checkpoint import local_checkpoint
from qwen_export.errors import VerifyError
from qwen_export.graphs.checkpoint.adapters.adapter_hash import recorded_adapters
from qwen_export.graphs.checkpoint.adapters.merge_adapters import AdapterSource, adapter_source
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint, open_checkpoint
from qwen_export.graphs.checkpoint.tensor_names import StoredLayout, stored_tensors
from qwen_export.graphs.quantization.kept_grids import keep_stored
from qwen_export.graphs.quantization.precision_plan import QUANTIZED, PrecisionPlan
from qwen_export.manifest import ADAPTERS, CALIBRATION, ROPE_SCALING, Manifest, load_manifest, write_manifest
from qwen_export.plugins.native.native_search import find_search
from qwen_export.runtimes.backends.compatibility import psutil_memory
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.model import Model, load
from qwen_export.runtimes.text_check import check_text
from qwen_export.targets import TARGETS
from qwen_export.verification.bundle_codes import BundleCodes
from qwen_export.verification.cache_rounding import CACHE_CHANGE, caches_of, with_caches
from qwen_export.verification.tower_check import FEATURE_TOLERANCE, ROUNDED_TO_BYTES, PictureRun, eager_features, eager_logits, run_pictures

if TYPE_CHECKING:
    from qwen_export.graphs.models.text_model import TextModel

# Largest allowed |error| of a logit, in standard deviations of the reference's logits. transformers itself, in fp16 and bf16, is off by
# 0.05 and 0.34 on the 0.8B shape.
TOLERANCE = {"fp32": 1.5e-4, "tf32": 0.01, "fp16": 0.08, "bf16": 0.5, "int8": 0.5, "int4": 0.5, "fp8": 0.5}
# Quantized: the largest error varies from text to text, so the root mean square decides, in the same unit. "activations": against the same
# rounded weights; "fp8 activations" where prompts round activations to E4M3, as the FP8 releases prescribe; else against those of the
# checkpoint.
RMS_TOLERANCE = {"activations": 0.1, "fp8 activations": 0.3, "int8": 0.15, "int4": 0.85, "fp8": 0.5}
PROMPT_TOKENS, GREEDY_TOKENS = 48, 24
_CAPACITY = 128

Logits = npt.NDArray[np.float32]
Report = Callable[[str, int, int], None]
"""Progress: what is done now and what is counted, how many are done, how many there are; 0 where nothing is counted."""

Count = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison. `max_abs_error` in logits; None for a check that counts instead."""

    name: str
    against: str
    max_abs_error: float | None
    tolerance: float | None
    passed: bool
    note: str = ""


def verify(
    bundle: str | Path,
    reference: str | Path,
    report: Report | None = None,
    *,
    device: str | None = None,
    runtime: str | None = None,
    device_id: int = 0,
    devices: Sequence[int] = (),
    native: str | None = None,
    lora: Sequence[str | Path | AdapterSource] = (),
) -> dict[str, Any]:
    """Run every check; the result has `passed`, `logit_std`, `checks` and `skipped`, and is written to the bundle's manifest. `device`,
    `runtime`, `device_id`, `devices` and `native` as in `runtimes.load`; `lora`: where the adapters of the bundle are now, if they have
    moved.

    Needs memory for the bundle, then for one layer of the checkpoint in fp32. Raises VerifyError when the checkpoint is another model."""
    say = report or (lambda text, done, total: None)
    directory = Path(bundle)
    manifest = load_manifest(directory)
    check_text(directory, manifest.files)
    source = reference_checkpoint(manifest, reference, lora)
    ids = np.random.default_rng(0).integers(0, manifest.model["vocab_size"], PROMPT_TOKENS).tolist()
    say("loading the bundle", 0, 0)
    capacity = min(_CAPACITY, manifest.max_context)
    model = load(directory, max_context=capacity, device=device, runtime=runtime, device_id=device_id, devices=devices, native=native)
    run = _run_bundle(model, ids, say)
    quantized = manifest.target.precision in QUANTIZED
    text = [*ids, *run.chosen]
    # One call, since a call reads the whole checkpoint: a later token changes nothing before it.
    exact = _eager(source, None, text, say, "eager")
    plain = exact[: len(ids)]
    scale = float(plain.std())
    caches = caches_of(manifest)
    limit = with_caches(TOLERANCE[arithmetic(manifest, manifest.target.precision)], caches) * scale

    def compared(name: str, against: str, got: Logits, wanted: Logits, rounding: str) -> Check:
        return _rms(name, against, got, wanted, RMS_TOLERANCE[rounding]) if quantized else _logits(name, against, got, wanted, limit)

    checks: list[Check] = []
    against, rows = "eager", exact
    if quantized:
        checks.append(compared("quantization", against, run.logits["prefill"], plain, manifest.target.precision))
        against = "eager, quant."
        rows = _eager(source, reference_plan(source, manifest, directory), text, say, "eager, quantized weights", caches)
    elif caches is not None:
        checks.append(_rms("caches", against, run.logits["prefill"], plain, CACHE_CHANGE[caches.name]))
        against = f"eager, {caches.name}"
        rows = _eager(source, None, text, say, f"eager, {caches.name} caches", caches)
    rounding = "fp8 activations" if (manifest.target.precision, manifest.target.device) == ("fp8", "cuda") else "activations"
    checks += [compared(name, against, got, rows[: len(ids)], rounding) for name, got in run.logits.items()]
    checks.append(run.rewind)
    checks.append(_greedy(run.chosen, rows[len(ids) - 1 : -1], limit))
    if run.pictures is not None:
        plan = reference_plan(source, manifest, directory) if quantized else None
        wanted = eager_features(source, manifest, run.pictures, plan)
        share = FEATURE_TOLERANCE[arithmetic(manifest, activation_precision(manifest.target.precision, manifest.target.device))]
        if plan is not None and plan.groups["vision"].quant is not None and manifest.target.device == "cpu":
            share = ROUNDED_TO_BYTES
        checks += [
            _logits("vision tower", against, got, exact, share * float(np.abs(exact).max()))
            for got, exact in zip(run.pictures.features, wanted, strict=True)
        ]
        rows = eager_logits(_streamed(source, plan, say, "eager with pictures"), run.pictures, wanted, caches)
        checks.append(compared("pictures", against, run.pictures.logits, rows, rounding))
    skipped = _no_transformers(source)
    if not skipped:
        say("transformers", 0, 0)
        theirs = _transformers(source, ids, ROPE_SCALING in manifest.source)
        if caches is not None and not quantized:
            checks.append(_rms("prefill", "transformers", run.logits["prefill"], theirs, CACHE_CHANGE[caches.name]))
        else:
            checks.append(compared("prefill", "transformers", run.logits["prefill"], theirs, manifest.target.precision))
    result = {
        "passed": all(check.passed for check in checks),
        "when": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "precision": manifest.target.precision,
        "logit_std": scale,
        "checks": [dataclasses.asdict(check) for check in checks],
        "skipped": {"transformers": skipped} if skipped else {},
    }
    write_manifest(directory, dataclasses.replace(manifest, verification=result))
    return result


@dataclasses.dataclass(frozen=True)
class _BundleRun:
    """What the bundle made of a text: logits [T,V] by the way it was read, the check of going back, and the tokens that follow; and of
    pictures, where it reads them."""

    logits: dict[str, Logits]
    rewind: Check
    chosen: list[int]
    pictures: PictureRun | None


def _run_bundle(model: Model, ids: list[int], say: Report) -> _BundleRun:
    decoder = model.decoder()

    def counted(name: str) -> Count:
        return lambda done: say(f"{name}, tokens", done, len(ids))

    logits = {name: run(decoder, ids, counted(name)) for name, run in _RUNS}
    rewind = _rewind(decoder, ids)
    decoder.reset()
    chosen = [int(decoder.prefill(ids).argmax())]
    while len(chosen) < GREEDY_TOKENS:
        say("greedy continuation, tokens", len(chosen), GREEDY_TOKENS)
        chosen.append(decoder.step([chosen[-1]])[0].argmax())
    return _BundleRun(logits, rewind, chosen, run_pictures(model))


def reference_checkpoint(manifest: Manifest, reference: str | Path, lora: Sequence[str | Path | AdapterSource] = ()) -> Checkpoint:
    """The checkpoint as the bundle was built from it, with its adapters. Raises VerifyError when it is another model."""
    adapters = recorded_adapters(manifest.source.get(ADAPTERS), [adapter_source(text) for text in lora])
    source = open_checkpoint(local_checkpoint(reference), manifest.source.get(ROPE_SCALING), adapters)
    if source.config.text.to_json() != manifest.model:
        raise VerifyError(
            "the reference is not the checkpoint that the bundle was built from",
            where=str(reference),
            fix="Give that checkpoint as {reference}.",
        )
    return source


def _one_call(decoder: Decoder, ids: list[int], read: Count) -> Logits:
    decoder.reset()
    read(0)
    return decoder.read(ids).copy()


def _chunked(decoder: Decoder, ids: list[int], read: Count) -> Logits:
    """Chunks of 1, 2, 3, ... tokens: every split is at another place in the convolution's window."""
    decoder.reset()
    parts, start, size = [], 0, 1
    while start < len(ids):
        parts.append(decoder.read(ids[start : start + size]).copy())
        start, size = start + size, size + 1
        read(min(start, len(ids)))
    return np.concatenate(parts)


def _token_by_token(decoder: Decoder, ids: list[int], read: Count) -> Logits:
    decoder.reset()
    rows = []
    for token in ids:
        rows.append(decoder.step([token]).copy())
        read(len(rows))
    return np.concatenate(rows)


_RUNS: tuple[tuple[str, Callable[[Decoder, list[int], Count], Logits]], ...] = (
    ("prefill", _one_call),
    ("chunked prefill", _chunked),
    ("decode", _token_by_token),
)


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


def _greedy(chosen: list[int], rows: Logits, limit: float) -> Check:
    """Greedy tokens of the bundle against the logits of the eager model on the same text; a difference counts only beyond the tolerance."""
    gaps = rows.max(axis=1) - rows[np.arange(len(chosen)), chosen]
    ties, wrong = int(((gaps > 0) & (gaps <= 2 * limit)).sum()), int((gaps > 2 * limit).sum())
    return Check("greedy tokens", "eager", None, None, wrong == 0, f"{len(chosen)} tokens, {wrong} different, {ties} near-ties")


def _eager(
    source: Checkpoint, quantization: PrecisionPlan | None, ids: list[int], say: Report, name: str, caches: CacheFormat | None = None
) -> Logits:
    """Logits [T,V] of the eager modules in fp32 with the checkpoint's weights, or what a plan makes of them. `caches`: what attention
    caches keep of values, by default all."""
    from qwen_export.graphs.models.eager_sequence import EagerSequence

    return EagerSequence(_streamed(source, quantization, say, name), len(ids), caches).read(ids)


def _streamed(source: Checkpoint, quantization: PrecisionPlan | None, say: Report, name: str) -> TextModel:
    from qwen_export.verification.streamed_decoder import streamed_decoder

    return streamed_decoder(source, quantization, lambda layer, count: say(f"{name}, layers", layer, count))


def _no_transformers(source: Checkpoint) -> str:
    """Why there is no comparison with transformers; "" when there is one."""
    if not importlib.util.find_spec("transformers"):
        return "not installed"
    if source.adapters:
        return "it would not merge the adapters"
    if source.logical is not None:
        return "the checkpoint is not in a form that it reads"
    if source.config.quantization:
        return "it may take the codes of a quantized checkpoint for weights"
    need = 4 * sum(prod(shape) for _, shape in stored_tensors(source.config.text, StoredLayout.of(source)))
    have = int(psutil_memory().available)
    return f"it needs {need / 2**30:.1f} GiB of memory, and {have / 2**30:.1f} GiB are free" if need > have else ""


def reference_plan(source: Checkpoint, manifest: Manifest, bundle: Path) -> PrecisionPlan:
    """The precision plan of a bundle that was built from `source`, with the codes that were calibrated for it."""
    entries = manifest.precision_plan
    plan, search = PrecisionPlan.from_json(entries), find_search()
    plan = dataclasses.replace(plan, fp8_block=TARGETS[manifest.target.name].fp8_block)
    if search is not None:
        plan = dataclasses.replace(plan, search=search)
    if PrecisionPlan.keeps(entries):
        plan = keep_stored(plan, source, [name for name, _ in stored_tensors(source.config.text, StoredLayout.of(source))])
    return dataclasses.replace(plan, codes=BundleCodes(bundle, manifest, plan)) if CALIBRATION in manifest.files else plan


def _transformers(source: Checkpoint, ids: list[int], scaled: bool) -> Logits:
    """Its logits; `scaled`: with the bundle's scaling of the rotary embedding instead of that of config.json."""
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
    lines += [f"  --   {name}: not run, {why}" for name, why in result.get("skipped", {}).items()]
    return lines


def dump(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1)
