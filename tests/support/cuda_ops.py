"""One op of the CUDA plugin on device buffers, and what its results are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper

from qwen_export.plugins.native import native_library as library
from qwen_export.runtimes.memory.buffers import ELEMENTS, as_bytes, decode, encode
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer

Array = npt.NDArray[Any]

LIMIT = {"float": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
"""Largest relative error in the norm: half a unit in the last place of the result, and of a normalized input."""


@cache
def session(op: str, dtype: str, inputs: tuple[tuple[str, str], ...], outputs: tuple[tuple[str, str, int], ...], attributes: str) -> Any:
    """One node with dynamic shapes. `inputs` are names ("" is left out) and dtypes, `outputs` names, dtypes and ranks."""
    import onnxruntime as ort

    ort.preload_dlls()
    node = helper.make_node(
        op, [name for name, _ in inputs], [name for name, _, _ in outputs], domain=library.NATIVE, **dict(eval(attributes))
    )
    given = [helper.make_tensor_value_info(name, ELEMENTS[kind][1], None) for name, kind in inputs if name]
    made = [helper.make_tensor_value_info(name, ELEMENTS[kind][1], [None] * rank) for name, kind, rank in outputs]
    graph = helper.make_graph([node], op, given, made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(library.NATIVE, 1)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library.find_library("cuda")))
    providers = [("CUDAExecutionProvider", {"enable_cuda_graph": "1"}), "CPUExecutionProvider"]
    return ort.InferenceSession(model.SerializeToString(), options, providers=providers)


_graphs = iter(range(1, 1 << 30))


def device(values: Array, dtype: str) -> CudaBuffer:
    buffer = CudaBuffer(dtype, values.shape)
    whole = {"int64": np.int64} | dict.fromkeys(("uint8", "int8", "float8e4m3fn"), np.uint8)  # fp8: as bytes
    buffer.write(as_bytes(values.astype(whole[dtype])) if dtype in whole else encode(values.astype(np.float32), dtype))
    return buffer


def rounded(values: Array, dtype: str) -> Array:
    """What the device sees, in float64."""
    return decode(encode(values.astype(np.float32), dtype), dtype, values.shape).astype(np.float64)


class OneOp:
    """An op bound to fresh device buffers; every run writes over poisoned outputs."""

    def __init__(
        self,
        op: str,
        dtype: str,
        inputs: dict[str, tuple[Array, str] | None],
        outputs: dict[str, tuple[tuple[int, ...], str]],
        **attributes: Any,
    ) -> None:
        import onnxruntime as ort

        named = tuple((name if given else "", given[1] if given else dtype) for name, given in inputs.items())
        made = tuple((name, kind, len(shape)) for name, (shape, kind) in outputs.items())
        self._session = session(op, dtype, named, made, repr(sorted(attributes.items())))
        self._binding = self._session.io_binding()
        self.inputs = {name: device(*given) for name, given in inputs.items() if given}
        self.outputs = {name: CudaBuffer(kind, shape) for name, (shape, kind) in outputs.items()}
        for name, buffer in self.inputs.items():
            self._binding.bind_input(name, "cuda", 0, ELEMENTS[buffer.dtype][1], buffer.shape, buffer.address)
        self.bind_outputs()
        self._options = ort.RunOptions()

    def bind_outputs(self, **instead: CudaBuffer) -> None:
        self.outputs |= instead
        for name, buffer in self.outputs.items():
            self._binding.bind_output(name, "cuda", 0, ELEMENTS[buffer.dtype][1], buffer.shape, buffer.address)

    def run(self, *, recorded: bool = False, poison: bool = True) -> dict[str, Array]:
        if not recorded:
            self._options.add_run_config_entry("gpu_graph_id", "-1")
        if poison:
            for buffer in self.outputs.values():
                buffer.write(np.full(buffer.nbytes, 0xFF, np.uint8))
        self._session.run_with_iobinding(self._binding, self._options)
        return {name: decode(b.read(), b.dtype, b.shape).astype(np.float64) for name, b in self.outputs.items()}

    def replays(self, **kwargs: Any) -> Iterator[dict[str, Array]]:
        """A plain run, the run that records, two replays."""
        self._options.add_run_config_entry("gpu_graph_id", str(next(_graphs)))
        for _ in range(4):
            yield self.run(recorded=True, **kwargs)


def error(got: Array, expected: Array) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def normalized(x: Array, weight: Array, dtype: str) -> Array:
    return rounded(x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight, dtype)
