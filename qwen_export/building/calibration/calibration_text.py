"""The text of a calibration, as windows of token ids."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwen_export.building.calibration.calibration_plan import MOST_WINDOWS, WINDOW, text_name, text_path
from qwen_export.errors import CheckpointError, ParameterError
from qwen_export.runtimes.text.text_files import TextFiles

LEAST_TOKENS = 256
"""Without so many nothing can be learned."""


@dataclass(frozen=True)
class CalibrationText:
    """`windows` i64[W,T]. `name` for people, `digest` of the file's bytes."""

    name: str
    digest: str
    windows: npt.NDArray[np.int64]

    def __str__(self) -> str:
        return f"{self.name}, {self.windows.size} tokens, sha256 {self.digest}"


def read_text(calibrate: str | Path, checkpoint: Path) -> CalibrationText:
    """The text in tokens of the checkpoint's tokenizer. A text of more than MOST_WINDOWS windows is represented by windows that are spread
    evenly over it. Raises ParameterError for a text that is too short."""
    path = text_path(calibrate)
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ParameterError(
            "the calibration text is not UTF-8",
            parameter="calibrate",
            got=f"{path}: {error}"[:200],
            fix="Convert the file that {calibrate} names.",
        ) from error
    files = TextFiles(checkpoint, error=CheckpointError)
    ids = files.tokenizer.encode(text)
    if len(ids) < LEAST_TOKENS:
        raise ParameterError(
            "the calibration text is too short",
            parameter="calibrate",
            got=f"{len(ids)} tokens",
            expected=f"at least {LEAST_TOKENS}",
            fix="Give a longer text as {calibrate}, or the built-in one.",
        )
    length = min(WINDOW, len(ids))
    count = min(MOST_WINDOWS, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return CalibrationText(text_name(path), sha256(data).hexdigest(), np.array([ids[start : start + length] for start in starts], np.int64))
