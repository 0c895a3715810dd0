"""Moe and QuantMoe of the CPU plugin against float64. A process has one instruction set, so this is also a script:

QWEN_EXPORT_CPU_SET=base python -m tests.support.moe_ops LIBRARY
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from ml_dtypes import bfloat16
from onnx import TensorProto, helper

from qwen_export.graphs.quantization.packing import QuantFormat, dequantize, pack
from tests.support.plugin_session import plugin_session

Array = npt.NDArray[Any]

_ELEMENTS = {"float32": TensorProto.FLOAT, "bfloat16": TensorProto.BFLOAT16, "uint8": TensorProto.UINT8}


@dataclass
class Layer:
    """The experts of a layer as one of the ops takes them, and as float64. `gate_up` [E,2I,H], `down` [E,H,I]."""

    op: str
    top_k: int
    inputs: tuple[Array, Array]
    attributes: dict[str, int]
    gate_up: Array
    down: Array


def plain_layer(E: int, K: int, H: int, inner: int, dtype: Any = np.float32) -> Layer:
    rng = np.random.default_rng([E, H, inner])
    gate_up = (rng.standard_normal((E, 2 * inner, H)) / np.sqrt(H)).astype(dtype)
    down = (rng.standard_normal((E, H, inner)) / np.sqrt(inner)).astype(dtype)
    return Layer("Moe", K, (gate_up, down), {"top_k": K}, gate_up.astype(np.float64), down.astype(np.float64))


def quant_layer(E: int, K: int, H: int, inner: int, format: QuantFormat) -> Layer:
    """Random codes: the op has to multiply what they stand for."""
    rng = np.random.default_rng([E, H, inner, format.bits])
    packed, wide, attributes = [], [], {"top_k": K, "inner": inner}
    for prefix, rows, columns in (("gate_up_", 2 * inner, H), ("down_", H, inner)):
        blocks = format.blocks(columns)
        codes = rng.integers(0, 1 << format.bits, (E, rows, columns)).astype(np.uint8)
        scales = (rng.uniform(0.5, 1.5, (E, rows, blocks)) * 4 / (1 << format.bits) / np.sqrt(columns)).astype(np.float16)
        zeros = rng.integers(0, 1 << format.bits, (E, rows, blocks)).astype(np.uint8) if format.zeros else None
        parts = [(codes[e], scales[e], None if zeros is None else zeros[e]) for e in range(E)]
        packed.append(np.stack([pack(format, *part) for part in parts]))
        wide.append(np.stack([dequantize(format, *part) for part in parts]).astype(np.float64))
        found = format.attributes(rows, columns)
        attributes |= {prefix + name: found[name] for name in ("bits", "block", "zeros", "wide_scales")}
    return Layer("QuantMoe", K, (packed[0], packed[1]), attributes, wide[0], wide[1])


@cache
def _session(library: str, op: str, element: str, attributes: tuple[tuple[str, int], ...], threads: int) -> ort.InferenceSession:
    node = helper.make_node(op, ["x", "logits", "gate_up", "down"], ["y"], domain="qwen.native", **dict(attributes))
    kinds = {"x": "float32", "logits": "float32", "gate_up": element, "down": element}
    given = [helper.make_tensor_value_info(name, _ELEMENTS[kind], None) for name, kind in kinds.items()]
    return plugin_session(library, node, given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], threads)


def call(library: str, layer: Layer, x: Array, logits: Array, threads: int = 2) -> Array:
    element = layer.inputs[0].dtype.name
    session = _session(library, layer.op, element, tuple(layer.attributes.items()), threads)
    values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for name, value in (("x", x), ("logits", logits))}
    for name, weight in zip(("gate_up", "down"), layer.inputs, strict=True):
        raw = weight.view(np.uint16) if element == "bfloat16" else weight
        values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, _ELEMENTS[element])
    return np.asarray(session.run_with_ort_values(["y"], values)[0].numpy())


def expected(layer: Layer, x: Array, logits: Array) -> Array:
    """In float64, with the experts that torch.topk selects."""
    probabilities = torch.from_numpy(logits).softmax(-1)
    weights, selected = (np.asarray(t) for t in torch.topk(probabilities, layer.top_k, dim=-1))
    y = np.zeros(x.shape)
    for t, row in enumerate(x.astype(np.float64)):
        for weight, e in zip(weights[t].astype(np.float64) / weights[t].astype(np.float64).sum(), selected[t], strict=True):
            gate, up = np.split(layer.gate_up[e] @ row, 2)
            y[t] += weight * (layer.down[e] @ (gate / (1 + np.exp(-gate)) * up))
    return y


def tokens(layer: Layer, count: int, seed: int = 0) -> tuple[Array, Array]:
    """x [count,H] and router logits [count,E]; the first of many are the same as of few."""
    E, H = layer.gate_up.shape[0], layer.gate_up.shape[2]
    rng = np.random.default_rng(seed)
    both = rng.standard_normal((max(count, 150), H + E)).astype(np.float32)[:count]
    return np.ascontiguousarray(both[:, :H]), 2 * np.ascontiguousarray(both[:, H:])


def error(got: Array, wanted: Array) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


# Activations of the quantized op are rounded to 8 bits per block.
LAYERS = {
    "fp32": (plain_layer(6, 2, 20, 5), 2e-6),
    "fp32-8-of-256": (plain_layer(256, 8, 64, 32), 2e-6),
    "bf16-10-of-512": (plain_layer(512, 10, 64, 16, bfloat16), 2e-6),
    "bf16-odd": (plain_layer(9, 4, 67, 35, bfloat16), 2e-6),
    "int4": (quant_layer(16, 4, 64, 32, QuantFormat(4, 32)), 2e-2),
    "int4-zeros": (quant_layer(16, 4, 128, 64, QuantFormat(4, 64, zeros=True)), 2e-2),
    "int8": (quant_layer(16, 4, 96, 48, QuantFormat(8, 32)), 2e-2),
}
COUNTS = (1, 2, 3, 7, 30, 150)


def check(library: str) -> None:
    """Every form and number of tokens; a token alone gives the bits that it gives among others."""
    for name, (layer, tolerance) in LAYERS.items():
        x, logits = tokens(layer, COUNTS[-1])
        wanted, whole = expected(layer, x, logits), call(library, layer, x, logits)
        for count in COUNTS:
            got = call(library, layer, x[:count], logits[:count], threads=1 + count % 2)
            assert error(got, wanted[:count]) < tolerance, (name, count, error(got, wanted[:count]))
            assert np.array_equal(got, whole[:count]), ("bits differ", name, count)
        alone = np.concatenate([call(library, layer, x[t : t + 1], logits[t : t + 1]) for t in range(60, 80)])
        assert np.array_equal(alone, whole[60:80]), ("bits differ", name)


if __name__ == "__main__":
    check(sys.argv[1])
