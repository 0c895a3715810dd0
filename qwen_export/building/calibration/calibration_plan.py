"""What a calibration will do, known before any weight is read. Imports neither torch nor the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path

from qwen_export.errors import ParameterError
from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.quantization.precision_plan import GPTQ, QUANTIZED, PrecisionPlan
from qwen_export.targets import BUILT_IN_TEXT, Target

WINDOW, MOST_WINDOWS = 512, 64
"""Tokens of a window, and windows of a text."""
BUILT_IN_FILE = Path(__file__).with_name("calibration.txt")


@dataclass(frozen=True)
class CalibrationPlan:
    """`name` and `digest` (SHA-256) of the text, and the stored matrices that it chooses the codes of, with their shapes. `disk_bytes`: the
    most that activations take beside the bundle while it is built, and codes."""

    name: str
    digest: str
    matrices: dict[str, tuple[int, ...]]
    disk_bytes: int

    @property
    def note(self) -> str:
        parameters = sum(map(prod, self.matrices.values()))
        return (
            f"calibration: {len(self.matrices)} matrices, {parameters:,} parameters, with {self.name} (sha256 {self.digest[:12]}); "
            f"up to {self.disk_bytes / 1e6:,.0f} MB beside the bundle meanwhile"
        )


def text_path(calibrate: str | Path) -> Path:
    """The file that {calibrate} names. Raises ParameterError where there is none."""
    path = BUILT_IN_FILE if str(calibrate) == BUILT_IN_TEXT else Path(calibrate)
    if not path.is_file():
        raise ParameterError(
            "there is no such calibration text",
            parameter="calibrate",
            got=str(calibrate),
            expected="a text file in UTF-8",
            fix="Correct {calibrate}, or leave out the file for the built-in text.",
        )
    return path


def text_name(path: Path) -> str:
    """Of the file, for people."""
    return BUILT_IN_TEXT if path == BUILT_IN_FILE else path.name


def calibration_reasons(target: Target, precision: str, plan: PrecisionPlan | None, calibrate: str | Path | None) -> list[str]:
    """Why the plan cannot be calibrated, or not be left uncalibrated."""
    if plan is None:
        return [f"a calibration chooses codes of the precisions {' and '.join(QUANTIZED[:-1])}, not {precision}"] * (calibrate is not None)
    chosen = [name for name, format in plan.groups.items() if format.method == GPTQ]
    chosen += [pattern for pattern, keys in plan.matrices.items() if keys.get("method") == GPTQ]
    if calibrate is None:
        return [f"the precision plan has the method {GPTQ} for {', '.join(chosen)}, which needs a text (calibrate)"] if chosen else []
    if target.static:
        return [f"target {target.name} has no calibrated codes: `verify` could not read them back"]
    return [] if chosen else ["nothing is left to calibrate: the plan has no matrices of 4 bits with the method search"]


def plan_calibration(
    config: TextConfig, plan: PrecisionPlan, calibrate: str | Path, tensors: Iterable[tuple[str, tuple[int, ...]]]
) -> CalibrationPlan:
    """`tensors`: names and shapes of the stored matrices of the build."""
    path = text_path(calibrate)
    matrices = {name: shape for name, shape in tensors if plan.of(name).method == GPTQ}
    widest = max(config.value_dim, config.num_attention_heads * config.head_dim, config.intermediate_size)
    activations = 4 * WINDOW * MOST_WINDOWS * (3 * config.hidden_size + widest)
    codes = sum(prod(shape) * chosen.bits_per_weight(shape[-1]) for name, shape in matrices.items() if (chosen := plan.of(name).quant))
    return CalibrationPlan(text_name(path), sha256(path.read_bytes()).hexdigest(), matrices, activations + int(codes) // 8)
