"""Codes that a text chooses, matrix by matrix: what they gain, where they are kept, and the mixer that makes the inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_export.building.calibration.delta_net_windows import delta_rule
from qwen_export.graphs.ops import gated_delta_net_op
from qwen_export.graphs.quantization.calibrated_codes import CodeFile, grid_values
from qwen_export.graphs.quantization.gptq_codes import InputMoments, quantize_for_inputs
from qwen_export.graphs.quantization.packing import QuantFormat, dequantize
from qwen_export.graphs.quantization.scale_search import quantize

FORMATS = (QuantFormat(4, 32), QuantFormat(4, 64, True), QuantFormat(8, 128))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_outputs_for_correlated_inputs_are_closer_than_without_a_text(format: QuantFormat) -> None:
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((24, 200)).astype(np.float32)
    x = rng.standard_normal((1000, 24)).astype(np.float32) @ mixed + 0.1 * rng.standard_normal((1000, 200)).astype(np.float32)
    w = rng.standard_t(5, (48, 200)).astype(np.float32)
    moments = InputMoments(200)
    moments.add(torch.from_numpy(x))
    errors = [
        float(np.square(x @ (w - dequantize(format, *grid)).T).mean())
        for grid in (quantize_for_inputs(format, w, moments.feedback()), quantize(format, w, "search"))
    ]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("tokens", [64, 300, 1000])
def test_few_tokens_of_independent_inputs_do_no_harm(tokens: int) -> None:
    rng, format = np.random.default_rng(0), QuantFormat(4, 32)
    sizes = np.exp(0.7 * rng.standard_normal(256)).astype(np.float32)
    seen, others = (rng.standard_normal((n, 256)).astype(np.float32) * sizes for n in (tokens, 2000))
    w = rng.standard_t(5, (64, 256)).astype(np.float32)
    moments = InputMoments(256)
    moments.add(torch.from_numpy(seen))
    errors = [
        float(np.square(others @ (w - dequantize(format, *grid)).T).mean())
        for grid in (quantize_for_inputs(format, w, moments.feedback()), quantize(format, w, "search"))
    ]
    assert errors[0] < errors[1]


def test_inputs_that_are_all_zero_leave_the_codes_of_a_search() -> None:
    format, w = QuantFormat(4, 32), np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    found, searched = quantize_for_inputs(format, w, InputMoments(64).feedback()), quantize(format, w, "search")
    assert np.array_equal(found[0], searched[0])


@pytest.mark.parametrize("format", (*FORMATS, QuantFormat(4, 32, True)), ids=str)
def test_a_file_of_codes_gives_back_what_was_put_in(format: QuantFormat, tmp_path: Path) -> None:
    rng, file = np.random.default_rng(0), CodeFile(tmp_path / "codes", "key")
    grids = [quantize(format, rng.standard_normal((7, 45)).astype(np.float32), "search") for _ in range(3)]
    file.add("plain", -1, format, grids[0], searched=False)
    entries = [file.add("stack", i, format, grids[i + 1], searched=False) for i in range(2)]
    rows = file.codes("plain", 2, 5)
    assert rows is not None
    assert np.array_equal(grid_values(rows), dequantize(format, *grids[0])[2:5])
    file.restore(entries, file.end)
    stack = file.codes("stack", 0, 2)
    assert stack is not None
    assert np.array_equal(grid_values(stack)[1], dequantize(format, *grids[2]))
    assert file.codes("other", 0, 1) is None
    file.close()


@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_the_recurrence_in_chunks_is_that_of_the_op(tokens: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.nn.functional.normalize(torch.randn(3, tokens, 16), dim=-1) for _ in range(3))
    g, beta = -torch.rand(3, tokens), torch.rand(3, tokens)
    sequential = [x.transpose(0, 1) for x in (q, k, v, g, beta)]
    wanted, _ = gated_delta_net_op.delta_rule(*sequential, torch.zeros(3, 16, 16), 0)
    assert torch.allclose(delta_rule(q, k, v, g, beta), wanted.transpose(0, 1), atol=1e-5)
