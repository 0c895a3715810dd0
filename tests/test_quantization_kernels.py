"""Quantized products of the CPU plugin, with each instruction set of this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen_export.graphs.quantization.packing import QuantFormat
from qwen_export.plugins.native.native_library import find_library
from tests.support import quant_ops
from tests.support.instruction_sets import check_in_instruction_set

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def library() -> str:
    path = find_library("cpu")
    if path is None:
        pytest.skip("the CPU plugin is not built: plugins/native/cpu/build.sh")
    return str(path)


@pytest.mark.parametrize("instructions", ["base", "base_tiles", "avx2", "avx512", "amx"])
def test_every_form_against_numpy(library: str, instructions: str) -> None:
    """Products, SwiGLU and gathers of 24 formats over 15 numbers of rows; a set that the machine lacks falls back to the next."""
    check_in_instruction_set(quant_ops, library, instructions)


def test_a_matrix_of_another_size_than_its_format_is_refused(library: str) -> None:
    format = QuantFormat(4, 32)
    packed, _ = quant_ops.random_matrix(format, 32, 64)
    made = quant_ops.session(library, "QuantLinear", format, 48, 64, ("x", "w"))
    with pytest.raises(Exception, match="does not have the size of its format"):
        quant_ops.run(made, x=np.zeros((1, 64), np.float32), w=packed)


def test_an_id_outside_the_embedding_is_refused(library: str) -> None:
    format = QuantFormat(8, 32)
    packed, _ = quant_ops.random_matrix(format, 32, 64)
    made = quant_ops.session(library, "QuantGather", format, 32, 64, ("ids", "w"))
    with pytest.raises(Exception, match="an id is outside the embedding"):
        quant_ops.run(made, ids=np.array([32]), w=packed)


def test_rows_of_zeros_stay_zero(library: str) -> None:
    format = QuantFormat(8, 32)
    packed, _ = quant_ops.random_matrix(format, 32, 64)
    made = quant_ops.session(library, "QuantLinear", format, 32, 64, ("x", "w"))
    assert not quant_ops.run(made, x=np.zeros((3, 64), np.float32), w=packed).any()
