"""Codes for all matrices that the plan calibrates: embedding, layer after layer, draft head, over the windows of a text.

What an interrupted run has finished is kept in the work directory: a line of JSON per layer in a journal, the codes, and the stream behind
the last whole layer. The stream goes from one file to another, so a layer that was cut off can begin again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qwen_export.building.build_plan import BuildPlan
from qwen_export.building.calibration.calibration_text import CalibrationText
from qwen_export.building.calibration.layer_walk import LayerWalk
from qwen_export.building.calibration.matrix_calibration import MatrixCalibration
from qwen_export.building.calibration.row_places import row_places, write_places
from qwen_export.building.calibration.window_states import WindowStates
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.tensor_names import StoredLayout
from qwen_export.graphs.config import FULL
from qwen_export.graphs.models.draft_head_model import MtpHead, mtp_config
from qwen_export.graphs.models.norm_layer import ZeroCenteredRmsNorm
from qwen_export.graphs.quantization.calibrated_codes import CodeFile
from qwen_export.graphs.quantization.gptq_codes import InputMoments
from qwen_export.graphs.quantization.precision_plan import PrecisionPlan
from qwen_export.graphs.rotary import rotary_frequencies
from qwen_export.manifest import CALIBRATION
from qwen_export.version import __version__

JOURNAL, _CODES = "journal.calibration", "calibrated"
_ROWS = 64

Report = Callable[[str, int, int], None]


@dataclass
class _Work:
    """The files of a calibration in the work directory `folder`. `key`: of all that determines the codes."""

    folder: Path
    key: str

    def __post_init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        try:
            found = [json.loads(text) for text in (self.folder / JOURNAL).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError):
            found = []
        if found and found[0].get("key") == self.key:
            self.lines = found[1:]
        else:
            for path in self.folder.glob(f"{_CODES}*"):
                path.unlink()
        (self.folder / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in ({"key": self.key}, *self.lines)), encoding="utf-8")

    def note(self, line: dict[str, Any]) -> None:
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def stream(self, layers: int) -> Path:
        """The stream behind so many layers."""
        return self.folder / f"{_CODES}.stream.{layers % 2}"


@contextlib.contextmanager
def calibrated(
    source: Checkpoint, plan: BuildPlan, text: CalibrationText | None, models: Mapping[str, ir.Model], staging: Path, say: Report
) -> Iterator[tuple[BuildPlan, list[str]]]:
    """The plan with the codes that the text chooses, which are there as long as the context lasts, and the file that was added to the
    bundle for them; without a text the plan as it is. `models` are its graphs, before their weights are written."""
    if text is None or plan.calibration is None or plan.quantization is None:
        yield plan, []
        return
    places = row_places(models, plan.calibration.matrices)
    file = _calibrate(source, plan.quantization, text, plan.calibration.matrices, staging.parent, say, mtp=not plan.no_head)
    try:
        write_places(staging, text, file.searched, places)
        yield replace(plan, quantization=replace(plan.quantization, codes=file)), [CALIBRATION]
    finally:
        file.close()


def _calibrate(
    source: Checkpoint,
    plan: PrecisionPlan,
    text: CalibrationText,
    calibrated: Mapping[str, tuple[int, ...]],
    folder: Path,
    say: Report,
    *,
    mtp: bool,
) -> CodeFile:
    config, place, done = source.config.text, "calibrating", 0
    total = 4 * sum(map(prod, calibrated.values()))

    def progress(count: int) -> None:
        nonlocal done
        done += count
        say(place, done, total)

    with CheckpointReader(source) as reader:
        work = _Work(folder, _key(reader, plan, text, calibrated))
        file = CodeFile(folder / _CODES, sha256(work.key.encode()).hexdigest())
        matrices = MatrixCalibration(config, StoredLayout.of(source), plan, reader, file, calibrated, progress)
        if work.lines:
            finished = [entry for line in work.lines for entry in line["entries"]]
            file.restore(finished, work.lines[-1]["end"])
            done = 4 * sum(entry["N"] * entry["K"] for entry in finished)
        frequencies, scaling = rotary_frequencies(config)
        angles = torch.arange(text.windows.shape[1], dtype=torch.float32)[:, None] * torch.tensor(frequencies, dtype=torch.float32)
        inside = folder / f"{_CODES}.layer"
        inside.mkdir(exist_ok=True)
        walk = LayerWalk(config, matrices, angles.cos() * scaling, angles.sin() * scaling, inside)
        shape = (text.windows.shape[0], text.windows.shape[1], config.hidden_size)
        x = WindowStates(work.stream(len(work.lines)), shape, keep=bool(work.lines))
        if not work.lines:
            place = "calibrating, embedding"
            for part in x.batches():
                x.write(part, _embedded(matrices, text.windows[part], (config.vocab_size, config.hidden_size)))
        for i, kind in enumerate(config.layer_types):
            if i < len(work.lines):
                continue
            place = f"calibrating, layer {i + 1} of {config.num_layers}"
            say(place, done, total)
            before, x = x, WindowStates(work.stream(i + 1), shape)
            for part in x.batches():
                x.values[part] = before.values[part]
            walk.walk(f"layers.{i}.", kind, x)
            x.flush()
            file.flush()
            work.note({"entries": matrices.entries, "end": file.end})
            matrices.entries = []
        place = "calibrating, heads"
        _ends(walk, matrices, x, text, source, mtp=mtp)
        shutil.rmtree(inside)
    return file


def _key(reader: CheckpointReader, plan: PrecisionPlan, text: CalibrationText, calibrated: Mapping[str, tuple[int, ...]]) -> str:
    names = "; ".join(f"{name} {plan.of(name)} {plan.of(name).searcher.name} {reader.identity(name)}" for name in calibrated)
    arithmetic = f"torch {torch.__version__} {torch.get_num_threads()} threads"
    return f"{__version__} {arithmetic} {text} {json.dumps(plan.to_json())} {sha256(names.encode()).hexdigest()}"


def _embedded(matrices: MatrixCalibration, ids: Any, shape: tuple[int, int]) -> torch.Tensor:
    """ids i64[W,T] -> f32[W,T,H]. Rows are read some at a time, since formats pack several into one panel."""
    result = torch.empty(*ids.shape, shape[1])
    blocks = ids // _ROWS
    for block in np.unique(blocks):
        start = int(block) * _ROWS
        rows = matrices.rows("embed_tokens.weight", shape, start, min(shape[0], start + _ROWS))
        there = blocks == block
        result[torch.from_numpy(there)] = rows[torch.from_numpy(ids[there] - start)]
    return result


@torch.no_grad()
def _ends(walk: LayerWalk, matrices: MatrixCalibration, x: WindowStates, text: CalibrationText, source: Checkpoint, *, mtp: bool) -> None:
    """What reads the last layer's output: the LM head, where it is calibrated, and the draft head."""
    config = walk.config
    norm = ZeroCenteredRmsNorm(config.hidden_size, config.rms_norm_eps)
    matrices.fill(norm, "norm.")
    if matrices.wanted(["lm_head.weight"]):
        moments = InputMoments(config.hidden_size)
        for part in x.batches():
            moments.add(norm(x.read(part)))
        matrices.calibrate(["lm_head.weight"], moments)
    if not mtp:
        return
    with torch.device("meta"):
        head = MtpHead(config, 1).mtp
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        matrices.fill(getattr(head, name), f"mtp.{name}.")
    windows, length = text.windows.shape
    inputs = WindowStates(walk.folder / "pairs", (windows, length - 1, 2 * config.hidden_size))
    for part in x.batches():
        embedded = _embedded(matrices, text.windows[part, 1:], (config.vocab_size, config.hidden_size))
        hidden = norm(x.read(part)[:, :-1])
        inputs.write(part, torch.cat([head.pre_fc_norm_embedding(embedded), head.pre_fc_norm_hidden(hidden)], dim=-1))
    moments = InputMoments(2 * config.hidden_size)
    for part in inputs.batches():
        moments.add(inputs.read(part))
    matrices.calibrate(["mtp.fc.weight"], moments)
    matrices.fill(head.fc, "mtp.fc.")
    y = WindowStates(walk.folder / "head", (windows, length - 1, config.hidden_size))
    for part in inputs.batches():
        y.write(part, head.fc(inputs.read(part)))
    replace(walk, config=mtp_config(config)).walk("mtp.layers.0.", FULL, y)
