"""Where a bundle differs from its checkpoint: compiled graph and eager model, layer by layer.

The bundle reads a text through its own runtime, as a prompt, in steps and as drafts, with graphs that also give out what passes between
their layers. The eager model reads the same text in fp32, each layer starting from the stream that the bundle's layer started from: the
error of a layer is then its own, and one tolerance serves the first and the last. How far the streams have drifted apart, and how large
values become, is reported, too: the largest value of fp16 is 65504.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_export.graphs.checkpoint.adapters.merge_adapters import AdapterSource
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.layer_points import EMBEDDING, MIXER, OUTPUT, POINTS, PRODUCT, point_name, point_widths
from qwen_export.graphs.models.observed_layers import Floats, Observation, observe
from qwen_export.graphs.quantization.precision_plan import QUANTIZED
from qwen_export.manifest import load_manifest
from qwen_export.runtimes.backends.compatibility import check_runnable, for_device, for_runtime
from qwen_export.runtimes.backends.integrity import ensure_whole
from qwen_export.runtimes.backends.native_libraries import check_native
from qwen_export.runtimes.backends.open_graphs import OpenOptions, open_backend
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.memory.buffers import Buffer
from qwen_export.runtimes.model import Model
from qwen_export.runtimes.option_checks import check_devices
from qwen_export.verification.cache_rounding import caches_of, with_caches
from qwen_export.verification.layer_comparison import comparators, compare
from qwen_export.verification.layer_graphs import layer_graphs
from qwen_export.verification.logit_check import arithmetic, reference_checkpoint, reference_plan
from qwen_export.verification.tower_layers import TowerPart, tower_parts

# Largest allowed error of a layer's output that is its own, as a share of that output, by activations. Measured on the demo and on random
# checkpoints: 6e-7 in fp32, 8e-4 in fp16, 2e-2 where products round their input to 8 bits, as quantized ones on the CPU do. Steps of bf16
# are 8 times those of fp16; TF32 has the steps of fp16.
TOLERANCE = {"fp32": 1e-5, "tf32": 4e-3, "fp16": 4e-3, "bf16": 3.2e-2}
_ROUNDED_TO_BYTES = 5e-2
# A router that decides by less than this share of the tolerance, in units of its largest logit, may decide otherwise in another precision:
# the token is not compared there.
_NEAR_TIE = 0.5
FP16_MAX = 65504.0
WARN_SHARE = 0.25
# The prompt is longer than the chunks of the delta rule, and than a call of 64 tokens.
PROMPT_TOKENS, STEPS, DRAFTS = 72, 4, 4
_HEAD = "norm and head"

Report = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """One row: the embedding, a layer (`layer` is its index), what follows the last, or a part of the vision tower. `error`: of its output,
    as a share, from the same input; `drift`: likewise against the eager model that read the text alone; `reach`: the largest |value| of the
    eager model in it, `at` which point, and that as a share of what fp16 holds. `passed` None: not judged, as `note` says; `origin`: the
    first point that is off.
    """

    name: str
    layer: int | None
    kind: str
    tokens: int
    max_abs_error: float | None
    error: float | None
    drift: float | None
    reach: float | None
    at: str
    fp16_share: float | None
    passed: bool | None
    origin: str = ""
    note: str = ""


def verify_layers(
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
    """Compare layer by layer; the result has `passed`, `first` (the name of the first row over its tolerance, or ""), `tolerance`, `layers`
    and `warnings`. Nothing is written to the bundle.

    Needs memory for the bundle and for one layer of the checkpoint in fp32. Raises VerifyError when the checkpoint is another model, and
    where the bundle cannot show its layers, as one in stages. `device`, `device_id`, `devices` and `native` as in `runtimes.load`."""
    from qwen_export.verification.streamed_decoder import streamed_decoder

    tell = report or (lambda text, done, total: None)

    def say(text: str) -> None:
        tell(text, 0, 0)

    comparators()
    directory = Path(bundle)
    manifest = load_manifest(directory)
    source = reference_checkpoint(manifest, reference, lora)
    ensure_whole(directory, manifest)
    manifest = for_runtime(for_device(manifest, device), runtime)
    check_devices(devices, manifest)
    check_runnable(manifest, device_id)
    check_native(directory, manifest, native)
    text = source.config.text
    say("graphs with their layers as outputs")
    with layer_graphs(directory, manifest, text) as (graphs, changed):
        session = open_backend(directory, changed, OpenOptions(graphs=graphs, device_id=device_id))
        count = min(PROMPT_TOKENS + STEPS + DRAFTS + 1, manifest.max_context)
        decoder = Model(directory, changed, {name: session(name) for name in changed.graphs}, count).decoder()
        ids = np.random.default_rng(0).integers(0, text.vocab_size, count).tolist()
        say("reading a text")
        seen = _Seen(point_widths(text), count)
        seen.read(decoder, ids)
        del decoder, session
    say("eager model")
    quantized = manifest.target.precision in QUANTIZED
    plan = reference_plan(source, manifest, directory) if quantized else None
    model = streamed_decoder(source, plan, lambda layer, count: tell("eager model, layers", layer, count))
    caches = caches_of(manifest)
    alone = observe(model, ids, caches=caches)
    beside = observe(model, ids, seen.streams(), caches)
    activations = manifest.precision_plan["activations"]
    tolerance = _ROUNDED_TO_BYTES if quantized and manifest.target.device == "cpu" else TOLERANCE[arithmetic(manifest, activations)]
    tolerance = with_caches(tolerance, caches)
    rows = _rows(source, seen, alone, beside, tolerance)
    if manifest.vision is not None:
        say("pictures")
        rows += [_tower_row(part, tolerance) for part in tower_parts(directory, manifest, source, plan, device_id)]
    failed = [row.name for row in rows if row.passed is False]
    return {
        "passed": not failed,
        "first": failed[0] if failed else "",
        "precision": manifest.target.precision,
        "activations": activations,
        "tolerance": tolerance,
        "layers": [dataclasses.asdict(row) for row in rows],
        "warnings": _warnings(rows) if activations == "fp16" else [],
    }


class _Seen:
    """What a bundle's graphs gave out for a text of `count` tokens. Not every graph has every point: a prompt without logits needs no last
    layer."""

    def __init__(self, widths: Mapping[str, int], count: int) -> None:
        self.values = {point: np.zeros((count, width), np.float32) for point, width in widths.items()}
        self.there = {point: np.zeros(count, bool) for point in widths}
        self.logits: dict[int, Floats] = {}

    def read(self, decoder: Decoder, ids: list[int]) -> None:
        """A prompt, steps, and where the bundle can a verify and a step that takes its tokens in."""
        decoder.observer = self._observe
        drafts = min(DRAFTS, decoder.widest_verify) if decoder.widest_verify > 1 else 0
        at = len(ids) - STEPS - drafts - 1
        self.logits[at - 1] = decoder.prefill(ids[:at]).copy()
        for position in range(at, at + STEPS):
            self.logits[position] = decoder.step([ids[position]])[0].copy()
        at += STEPS
        if drafts:
            rows = decoder.verify(ids[at : at + drafts]).copy()
            self.logits |= {at + i: row for i, row in enumerate(rows)}
            decoder.accept(drafts)
        self.logits[len(ids) - 1] = decoder.step([ids[-1]])[0].copy()

    def _observe(self, start: int, count: int, results: Mapping[str, Buffer]) -> None:
        for point in self.values.keys() & results.keys():
            self.values[point][start : start + count] = results[point].array()[0, :count]
            self.there[point][start : start + count] = True

    def streams(self) -> dict[str, Floats]:
        """For `observe`: the streams between layers, NaN where a value was not seen or is not finite."""
        ends = {point: values for point, values in self.values.items() if point == EMBEDDING or point.endswith(f".{OUTPUT}")}
        known = {point: self.there[point] & np.isfinite(values).all(axis=-1) for point, values in ends.items()}
        return {point: np.where(known[point][:, None], values, np.float32(np.nan)) for point, values in ends.items()}

    def finite(self, point: str) -> bool:
        return bool(np.isfinite(self.values[point]).all())


def _rows(source: Checkpoint, seen: _Seen, alone: Observation, beside: Observation, tolerance: float) -> list[LayerResult]:
    kinds = source.config.text.layer_types
    rows = [_row(EMBEDDING, None, "", [EMBEDDING], None, seen, alone, beside, None, tolerance)]
    before = EMBEDDING
    for layer, kind in enumerate(kinds):
        gap = beside.routing_gap.get(layer)
        clear = gap > _NEAR_TIE * tolerance if gap is not None else None
        points = [point_name(layer, point) for point in POINTS]
        rows.append(_row(f"layer {layer}", layer, kind, points, before, seen, alone, beside, clear, tolerance))
        before = points[-1]
    rows.append(_head(before, seen, alone, beside, tolerance))
    return rows


def _row(
    name: str,
    layer: int | None,
    kind: str,
    points: list[str],
    before: str | None,
    seen: _Seen,
    alone: Observation,
    beside: Observation,
    clear: npt.NDArray[np.bool_] | None,
    tolerance: float,
) -> LayerResult:
    """The comparison of what passes `points`, of which the last is the output; `clear` tokens are compared there."""
    reaches = {point: float(np.abs(alone.points[point]).max()) for point in points}
    at = max(reaches, key=reaches.__getitem__)
    reach = reaches[at]
    facts: dict[str, Any] = {"name": name, "layer": layer, "kind": kind, "reach": reach, "at": _short(at), "fp16_share": reach / FP16_MAX}
    unjudged: dict[str, Any] = {"tokens": 0, "max_abs_error": None, "error": None, "drift": None}
    if before is not None and not seen.finite(before):
        return LayerResult(**facts, **unjudged, passed=None, note="reads values that are not finite")
    origin = next((point for point in points if not seen.finite(point)), "")
    if origin:
        return LayerResult(**facts, **unjudged, passed=False, origin=_short(origin), note="values are not finite")
    counted = {point: seen.there[point] for point in points if seen.there[point].any()}
    note = ""
    if clear is not None:
        ties = int((counted[points[-1]] & ~clear).sum())
        counted[points[-1]] = counted[points[-1]] & clear
        note = f"{ties} near-ties of the router left out" if ties else ""
        if not counted[points[-1]].any():
            return LayerResult(**facts, **unjudged, passed=None, note=note)
    got = {point: seen.values[point][rows] for point, rows in counted.items()}
    own = compare(got, {point: beside.points[point][rows] for point, rows in counted.items()}, dict.fromkeys(got, tolerance))
    end = points[-1]
    drift = compare({end: got[end]}, {end: alone.points[end][counted[end]]}, {end: tolerance})[end].share
    origin = "" if own[end].passed else next(_short(point) for point in points if point in own and not own[point].passed)
    return LayerResult(
        **facts,
        tokens=int(counted[end].sum()),
        max_abs_error=own[end].max_abs,
        error=own[end].share,
        drift=drift,
        passed=own[end].passed,
        origin=origin,
        note=note,
    )


def _tower_row(part: TowerPart, tolerance: float) -> LayerResult:
    at = max(part.reaches, key=part.reaches.__getitem__)
    reach = part.reaches[at]
    facts: dict[str, Any] = {"name": part.name, "layer": None, "kind": "vision", "reach": reach, "at": at, "fp16_share": reach / FP16_MAX}
    if not (np.isfinite(part.own).all() and np.isfinite(part.got).all()):
        unjudged: dict[str, Any] = {"tokens": 0, "max_abs_error": None, "error": None, "drift": None}
        if np.isfinite(part.own).all():
            return LayerResult(**facts, **unjudged, passed=False, origin=OUTPUT, note="values are not finite")
        return LayerResult(**facts, **unjudged, passed=None, note="reads values that are not finite")
    own, drift = (compare({at: part.got}, {at: other}, {at: tolerance})[at] for other in (part.own, part.alone))
    return LayerResult(**facts, tokens=len(part.got), max_abs_error=own.max_abs, error=own.share, drift=drift.share, passed=own.passed)


def _head(before: str, seen: _Seen, alone: Observation, beside: Observation, tolerance: float) -> LayerResult:
    positions = sorted(seen.logits)
    got = np.stack([seen.logits[position] for position in positions])
    facts: dict[str, Any] = {"name": _HEAD, "layer": None, "kind": "", "reach": None, "at": "", "fp16_share": None}
    finite = bool(np.isfinite(got).all())
    if not finite or not seen.finite(before):
        judged, note = (False, "values are not finite") if seen.finite(before) else (None, "reads values that are not finite")
        return LayerResult(**facts, tokens=0, max_abs_error=None, error=None, drift=None, passed=judged, note=note)
    own = compare({_HEAD: got}, {_HEAD: beside.logits[positions]}, {_HEAD: tolerance})[_HEAD]
    drift = compare({_HEAD: got}, {_HEAD: alone.logits[positions]}, {_HEAD: tolerance})[_HEAD].share
    return LayerResult(**facts, tokens=len(positions), max_abs_error=own.max_abs, error=own.share, drift=drift, passed=own.passed)


def _short(point: str) -> str:
    return point.rsplit(".", 1)[-1]


def _warnings(rows: list[LayerResult]) -> list[str]:
    """A message per layer whose values come near the largest of fp16, or pass it."""
    names = {MIXER: "the result of its mixer", PRODUCT: "the product in its MLP"}
    return [
        f"{row.name}: {names.get(row.at, 'the residual stream')} reaches {row.reach:.4g} in fp32, "
        + (
            f"{row.fp16_share:.0%} of what fp16 can hold"
            if row.fp16_share <= 1
            else f"and the largest value of fp16 is {FP16_MAX:.0f}: it overflows"
        )
        for row in rows
        if row.fp16_share is not None and row.reach is not None and row.fp16_share > WARN_SHARE
    ]
