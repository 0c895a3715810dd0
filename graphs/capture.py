"""From a module to graph IR: torch.export on the meta device, then torch.onnx for the aten ops. No weight is read.

The result is an onnx_ir.Model whose initializers are named like the module's parameters and carry `StoredWeight`s, and whose inputs and
outputs have the names of `graphs.contract`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch

from qwen_export.errors import CaptureError
from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.contract import state_names
from qwen_export.graphs.models.decoder import Decoder
from qwen_export.graphs.models.state import State, empty_state
from qwen_export.graphs.weights.expression import StoredWeight, WeightTensor
from qwen_export.plugins.ops.onnx_form import translation_table

OPSET = 21
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALWAYS_FP32 = ("A_log", "dt_bias")

# Dynamic sizes: batch, new tokens, cache slots, rows of logits, pending tokens.
_EXAMPLE = {"B": 2, "T": 5, "S": 16, "N": 4, "P": 3}
_STATE_DIMS = {
    "k_cache": {0: "B", 2: "S"},
    "v_cache": {0: "B", 2: "S"},
    "conv_history": {0: "B"},
    "recurrent": {0: "B"},
    "pending_qkv": {0: "B", 1: "P"},
    "pending_b": {0: "B", 1: "P"},
    "pending_a": {0: "B", 1: "P"},
}


def meta_decoder(config: TextConfig, precision: str) -> Decoder:
    """The decoder without storage: parameters have shape and dtype only."""
    with torch.device("meta"):
        model = Decoder(config).eval().to(DTYPES[precision])
        for name, parameter in model.named_parameters():
            if name.endswith(ALWAYS_FP32):
                parameter.data = parameter.data.float()
    return model


def capture_decoder(config: TextConfig, precision: str) -> ir.Model:
    """Trace the decoder in `precision` ("fp32", "fp16", "bf16") and translate it. Takes seconds and little memory at any model size."""
    model = meta_decoder(config, precision)
    state = empty_state(config, _EXAMPLE["B"], _EXAMPLE["S"], DTYPES[precision], pending=_EXAMPLE["P"], device="meta")
    arguments, dynamic = _arguments(config, state)
    with _quiet(), torch.no_grad():
        program = torch.export.export(model, arguments, dynamic_shapes=dynamic, strict=False)
        exported = torch.onnx.export(
            program,
            arguments,
            dynamo=True,
            custom_translation_table=translation_table(),
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    if exported is None:
        raise CaptureError("torch.onnx returned no program")
    return _named(exported.model, model, state)


def _arguments(config: TextConfig, state: State) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """Example arguments of Decoder.forward and which of their sizes are dynamic."""
    size = _EXAMPLE
    dim = {name: torch.export.Dim(name) for name in size}

    def ids(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int64, device="meta")

    def table() -> torch.Tensor:
        return torch.zeros(size["S"], config.rotary_dim // 2, device="meta")

    B, T, N = size["B"], size["T"], size["N"]
    arguments = (ids(B, T), table(), table(), ids(B), ids(B), ids(B), ids(N), state)
    per_sequence, row = {0: dim["B"]}, {0: dim["S"]}
    states = [{key: {axis: dim[name] for axis, name in _STATE_DIMS[key].items()} for key in layer} for layer in state]
    dynamic = ({0: dim["B"], 1: dim["T"]}, row, row, per_sequence, per_sequence, per_sequence, {0: dim["N"]}, states)
    return arguments, dynamic


def _named(model: ir.Model, module: Decoder, state: State) -> ir.Model:
    """Give inputs, outputs and initializers the names of the contract, and lazy weights for storage."""
    graph = model.graph
    keys = [list(layer) for layer in state]
    inputs = ["input_ids", "cos", "sin", "length", "accepted", "commit", "logit_rows", *state_names(keys)]
    outputs = ["logits", "hidden", *state_names(keys, after=True)]
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        if len(values) != len(names):
            raise CaptureError("the traced graph has another signature than the decoder", got=len(values), expected=len(names))
    # An output that is also an input of another op keeps one value: rename values, not uses.
    for value, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
        value.name = name
    sizes = {value: name for name, value in _EXAMPLE.items()}
    _name_dims(graph, sizes)
    parameters = dict(module.named_parameters())
    for name, value in list(graph.initializers.items()):
        if name not in parameters:
            raise CaptureError("the traced graph has a constant that is not a parameter", where=name)
        tensor = parameters[name]
        weight = StoredWeight(name, tuple(tensor.shape), _ir_dtype(tensor.dtype))
        value.const_value = WeightTensor(weight, name)
    return model


def _ir_dtype(dtype: torch.dtype) -> ir.DataType:
    return {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}[dtype]


def _name_dims(graph: ir.Graph, sizes: dict[int, str]) -> None:
    """torch names symbolic sizes s12, s70, ...; give them the names of the field, read off the inputs."""
    known: dict[str, str] = {}
    expected = {"input_ids": ("B", "T"), "cos": ("S", None), "logit_rows": ("N",)}
    for value in graph.inputs:
        names = expected.get(value.name or "")
        if value.name and value.name.endswith("pending_qkv"):
            names = ("B", "P", None)
        if names is None or value.shape is None:
            continue
        for dim, name in zip(value.shape, names, strict=True):
            if name is not None and isinstance(dim, ir.SymbolicDim) and dim.value:
                known[dim.value] = name
    seen = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in seen:
        if value.shape is not None:
            value.shape = ir.Shape([known.get(d.value or "", d.value) if isinstance(d, ir.SymbolicDim) else d for d in value.shape])


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx reports on missing optional packages and deprecations that its users cannot act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
