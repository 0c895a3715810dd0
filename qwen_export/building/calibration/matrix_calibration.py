"""The matrices of a model one after the other: weights in, codes for their inputs into a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.tensor_names import StoredLayout
from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.models.load_model import parameter_values
from qwen_export.graphs.quantization.calibrated_codes import CalibratedSource, CodeFile
from qwen_export.graphs.quantization.gptq_codes import Feedback, InputMoments, quantize_for_inputs
from qwen_export.graphs.quantization.packing import Floats
from qwen_export.graphs.quantization.precision_plan import GPTQ, PrecisionPlan
from qwen_export.graphs.quantization.scale_search import quantize
from qwen_export.graphs.weights.stored_layout import parameter_weight

LEAST_TOKENS = 64
"""Of an expert: with fewer, its codes are found from its weights alone."""


class MatrixCalibration:
    """Finds codes, and gives out the values of parameters: of matrices that have codes, what these stand for. `calibrated` are the stored
    matrices to find codes for, by their names among the modules."""

    def __init__(
        self,
        config: TextConfig,
        stored: StoredLayout,
        plan: PrecisionPlan,
        reader: CheckpointReader,
        file: CodeFile,
        calibrated: Mapping[str, tuple[int, ...]],
        done: Callable[[int], None],
    ) -> None:
        self.entries: list[dict[str, Any]] = []
        """What was added to the file since this list was emptied last."""
        self._config, self._stored, self._plan, self._file = config, stored, plan, file
        self._source, self._shapes, self._done = CalibratedSource(reader, file), calibrated, done

    def wanted(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self._shapes]

    def calibrate(self, names: Iterable[str], moments: InputMoments) -> None:
        """Find codes of matrices that read the same inputs."""
        wanted = self.wanted(names)
        if not wanted:
            return
        feedback = moments.feedback()
        for name in wanted:
            self._add(name, -1, self._source.rows(name, 0, self._shapes[name][0]), feedback)

    def calibrate_expert(self, parameter: str, expert: int, moments: InputMoments) -> None:
        """Find codes of one expert's matrices in `parameter` [E,N,K], which may be stored as one tensor or as several."""
        weight = self._weight(parameter)
        parts = [parameter] if parameter in self._shapes else [name for name in weight.stored() if f".experts.{expert}." in name]
        wanted = self.wanted(parts)
        if not wanted:
            return
        feedback = moments.feedback() if moments.tokens >= LEAST_TOKENS else None
        for name in wanted:
            fused = len(self._shapes[name]) == 3
            values = self._source.rows(name, expert, expert + 1)[0] if fused else self._source.rows(name, 0, self._shapes[name][0])
            self._add(name, expert if fused else -1, values, feedback)

    def expert_values(self, parameter: str, expert: int) -> torch.Tensor:
        """The matrix [N,K] of one expert."""
        return torch.from_numpy(parameter_values(self._weight(parameter), self._source, self._plan, expert, expert + 1)[0])

    def rows(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        weight = parameter_weight(self._config, self._stored, name, shape, ir.DataType.FLOAT)
        return torch.from_numpy(parameter_values(weight, self._source, self._plan, start, stop))

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module its parameters, whose names begin with `prefix`."""
        values = {}
        for name, parameter in module.named_parameters():
            weight = parameter_weight(self._config, self._stored, prefix + name, tuple(parameter.shape), ir.DataType.FLOAT)
            values[name] = torch.from_numpy(parameter_values(weight, self._source, self._plan))
        module.load_state_dict(values, strict=True, assign=True)
        module.requires_grad_(False)

    def _weight(self, parameter: str) -> Any:
        config = self._config
        E, H, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        shape = (E, 2 * inner, H) if parameter.endswith("gate_up_proj") else (E, H, inner)
        return parameter_weight(config, self._stored, parameter, shape, ir.DataType.FLOAT)

    def _add(self, name: str, index: int, values: Floats, feedback: Feedback | None) -> None:
        chosen = self._plan.of(name)
        if chosen.quant is None or chosen.method != GPTQ:
            raise AssertionError(f"{name} is not to be calibrated")
        if feedback is None:
            grid = quantize(chosen.quant, values, "search", chosen.search)
        else:
            grid = quantize_for_inputs(chosen.quant, np.ascontiguousarray(values), feedback)
        self.entries.append(self._file.add(name, index, chosen.quant, grid, searched=feedback is None))
        self._done(4 * prod(values.shape))
