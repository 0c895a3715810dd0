"""From a module to graph IR: torch.export on the meta device, then torch.onnx for the aten ops. No weight is read.

The result is an onnx_ir.Model whose initializers are named like the module's parameters and carry `StoredWeight`s, and whose inputs and
outputs have the names of `graphs.contract`.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qwen_export.bundle_contract import (
    ACCEPTED,
    COMMIT,
    FEATURES,
    HIDDEN,
    HIDDEN_OUT,
    INPUT_IDS,
    LENGTH,
    LOGIT_ROWS,
    LOGITS,
    PLACES,
    TABLES,
    VISION_INPUTS,
)
from qwen_export.cache_formats import CacheFormat
from qwen_export.element_types import PLAIN
from qwen_export.errors import REPORT, CaptureError
from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.models.draft_head_model import MtpHead
from qwen_export.graphs.models.model_state import State, empty_state
from qwen_export.graphs.models.text_model import TextModel
from qwen_export.graphs.models.vision_model import VisionModel
from qwen_export.graphs.ops.onnx_form import translation_table
from qwen_export.graphs.tensor_roles import state_names
from qwen_export.graphs.unroll import unroll
from qwen_export.graphs.vision_config import VisionConfig
from qwen_export.graphs.weights.expression import FirstRows, Reshaped, StoredWeight, Weight, WeightTensor

Module = TypeVar("Module", bound=torch.nn.Module)

OPSET = 21
DTYPES: dict[str, torch.dtype] = {kind.short: getattr(torch, kind.numpy) for kind in PLAIN}
ALWAYS_FP32 = ("A_log", "dt_bias")

_SYMBOL = re.compile(r"\bs\d+\b")
# Dynamic sizes: batch, new tokens, cache slots, rows of logits, pending tokens, tokens of pictures.
_EXAMPLE = {"B": 2, "T": 5, "S": 16, "N": 4, "P": 3, "K": 6}
_STATE_DIMS = {
    "k_cache": {0: "B", 2: "S"},
    "v_cache": {0: "B", 2: "S"},
    "conv_history": {0: "B"},
    "recurrent": {0: "B"},
    "pending_qkv": {0: "B", 1: "P"},
    "pending_b": {0: "B", 1: "P"},
    "pending_a": {0: "B", 1: "P"},
}


def meta_decoder(config: TextConfig, precision: str) -> TextModel:
    """The decoder without storage: parameters have shape and dtype only."""
    with torch.device("meta"):
        model = TextModel(config)
    return in_precision(model, precision)


def capture_decoder(config: TextConfig, precision: str, *, features: bool = False, caches: CacheFormat | None = None) -> ir.Model:
    """Trace the decoder in `precision` ("fp32", "fp16", "bf16") and translate it. Takes seconds and little memory at any model size.
    With `features` it reads pictures. `caches`: the format of attention caches, by default that of `precision`."""
    return with_all_layers(capture_kinds(config, precision, features=features, caches=caches), config)


def capture_kinds(config: TextConfig, precision: str, *, features: bool = False, caches: CacheFormat | None = None) -> ir.Model:
    """The decoder with one layer of each of its kinds, in the order in which they first come: what `capture_decoder` traces."""
    config = replace(config, layer_types=_kinds(config))
    sizes = (_EXAMPLE["B"], _EXAMPLE["S"])
    state = empty_state(config, *sizes, DTYPES[precision], caches=caches, pending=_EXAMPLE["P"], device="meta")
    inputs = [_ids("B", "T"), *_tables(config), _ids("B"), _ids("B"), _ids("B"), _ids("N"), *(_features(config, precision) * features)]
    names = [INPUT_IDS, *TABLES, LENGTH, ACCEPTED, COMMIT, LOGIT_ROWS, *([FEATURES, PLACES] * features)]
    model = capture_module(meta_decoder(config, precision), Signature(names, inputs, [LOGITS, HIDDEN], state))
    _simplify_row_choice(model)
    return model


def with_all_layers(model: ir.Model, config: TextConfig) -> ir.Model:
    """The model of `capture_kinds`, made that with every layer of `config` in place."""
    kinds = _kinds(config)
    unroll(model, [f"layers.{i}" for i in range(len(kinds))], [(f"layers.{i}", kinds.index(k)) for i, k in enumerate(config.layer_types)])
    return model


def _kinds(config: TextConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys(config.layer_types))


def capture_mtp(
    config: TextConfig, precision: str, draft_vocab: int, *, features: bool = False, caches: CacheFormat | None = None
) -> ir.Model:
    """Trace the draft head, which drafts from the lowest `draft_vocab` token ids. With `features` it reads pictures.
    `caches` as for the decoder."""
    with torch.device("meta"):
        model = MtpHead(config, draft_vocab)
    state = empty_state(model.config, _EXAMPLE["B"], _EXAMPLE["S"], DTYPES[precision], caches=caches, device="meta")
    hidden = example(("B", "T"), config.hidden_size, dtype=DTYPES[precision])
    inputs = [_ids("B", "T"), hidden, *_tables(config), _ids("B"), _ids("N"), *(_features(config, precision) * features)]
    names = [INPUT_IDS, HIDDEN, *TABLES, LENGTH, LOGIT_ROWS, *([FEATURES, PLACES] * features)]
    signature = Signature(names, inputs, [LOGITS, HIDDEN_OUT], state)
    head = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    whole = StoredWeight(head, (config.vocab_size, config.hidden_size), _ir_dtype(DTYPES[precision]))
    made = capture_module(in_precision(model, precision), signature, {"draft_head.weight": FirstRows(whole, draft_vocab)})
    _simplify_row_choice(made)
    return made


def capture_vision(config: VisionConfig, precision: str, tokens: int | None = None) -> ir.Model:
    """Trace the vision tower, for any number of slices and tokens, or for one slice of so many `tokens`."""
    with torch.device("meta"):
        model = VisionModel(replace(config, depth=1))
    M, half = config.merged, config.head_dim // 2
    sizes, last = (("B", "K"), ("K",)), (config.row_width, 4, 4, half, half)
    kinds = (torch.float32, torch.int64, torch.float32, torch.float32, torch.float32)
    inputs = [example(sizes[i > 0], M, size, dtype=kind) for i, (size, kind) in enumerate(zip(last, kinds, strict=True))]
    if tokens is not None:
        inputs = [_fixed(given, {"B": 1, "K": tokens}) for given in inputs]
    name = "visual.patch_embed.proj.weight"
    stored = (config.hidden_size, 3, config.temporal_patch_size, config.patch_size, config.patch_size)
    whole = StoredWeight(name, stored, _ir_dtype(DTYPES[precision]))
    derived = {name: Reshaped(whole, (config.hidden_size, config.row_width))}
    made = capture_module(in_precision(model, precision), Signature(list(VISION_INPUTS), inputs, [FEATURES]), derived)
    unroll(made, ["visual.blocks.0"], [(f"visual.blocks.{i}", 0) for i in range(config.depth)])
    return made


def in_precision(model: Module, precision: str) -> Module:
    model.eval().to(DTYPES[precision])
    for name, parameter in model.named_parameters():
        if name.endswith(ALWAYS_FP32):
            parameter.data = parameter.data.float()
    return model


class Input(NamedTuple):
    """An example argument and the names of its leading dynamic sizes."""

    value: torch.Tensor
    dims: tuple[str, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a graph before its states, in the order of the module's forward; its states come last in both."""

    input_names: list[str]
    inputs: list[Input]
    output_names: list[str]
    state: State | None = None


def example(dims: tuple[str, ...], *sizes: int, dtype: torch.dtype = torch.float32) -> Input:
    """An argument of dynamic sizes `dims`, then fixed ones."""
    return Input(torch.zeros(*(_EXAMPLE[dim] for dim in dims), *sizes, dtype=dtype, device="meta"), dims)


def _fixed(given: Input, sizes: Mapping[str, int]) -> Input:
    """The same argument with no dynamic sizes."""
    leading = [sizes[dim] for dim in given.dims]
    return Input(given.value.new_zeros(*leading, *given.value.shape[len(leading) :]), ())


def _ids(*dims: str) -> Input:
    return example(dims, dtype=torch.int64)


def _tables(config: TextConfig) -> list[Input]:
    return [example(("S",), config.rotary_dim // 2) for _ in TABLES]


def _features(config: TextConfig, precision: str) -> list[Input]:
    """Rows that stand for tokens of pictures, and where."""
    return [example(("K",), config.hidden_size, dtype=DTYPES[precision]), _ids("K")]


def capture_module(module: torch.nn.Module, signature: Signature, derived: Mapping[str, Weight] | None = None) -> ir.Model:
    """`derived` are parameters that the checkpoint does not have under their name."""
    dim = {name: torch.export.Dim(name) for name in _EXAMPLE}
    arguments: tuple[Any, ...] = tuple(given.value for given in signature.inputs)
    dynamic: tuple[Any, ...] = tuple({axis: dim[name] for axis, name in enumerate(given.dims)} for given in signature.inputs)
    if signature.state is not None:
        # Behind the inputs that every module has; features and places come after it.
        at = len(arguments) - 2 * (FEATURES in signature.input_names)
        states = [{key: {axis: dim[name] for axis, name in _STATE_DIMS[key].items()} for key in layer} for layer in signature.state]
        arguments = (*arguments[:at], signature.state, *arguments[at:])
        dynamic = (*dynamic[:at], states, *dynamic[at:])
    with _quiet(), torch.no_grad():
        program = torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)
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
        raise CaptureError("torch.onnx returned no program", fix=REPORT)
    return _named(exported.model, module, signature, derived or {})


def _named(model: ir.Model, module: torch.nn.Module, signature: Signature, derived: Mapping[str, Weight]) -> ir.Model:
    """Give inputs, outputs and initializers the names of the contract, and lazy weights for storage."""
    graph = model.graph
    keys = [list(layer) for layer in signature.state or ()]
    before = [name for name in signature.input_names if signature.state is None or name not in (FEATURES, PLACES)]
    inputs = [*before, *state_names(keys), *(name for name in signature.input_names if name not in before)]
    outputs = [*signature.output_names, *state_names(keys, after=True)]
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        if len(values) != len(names):
            raise CaptureError("the traced graph has another signature than the module", got=len(values), expected=len(names), fix=REPORT)
    # An output that is also an input of another op keeps one value: rename values, not uses.
    for value, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
        value.name = name
    _name_dims(graph, signature)
    parameters = dict(module.named_parameters())
    for name, value in list(graph.initializers.items()):
        if name not in parameters:
            raise CaptureError("the traced graph has a constant that is not a parameter", where=name, fix=REPORT)
        tensor = parameters[name]
        value.const_value = WeightTensor(derived.get(name) or StoredWeight(name, tuple(tensor.shape), _ir_dtype(tensor.dtype)), name)
    return model


def _simplify_row_choice(model: ir.Model) -> None:
    """Given  Gather(Reshape(x, sizes computed at run time), Cast(Reshape(logit_rows)))      x [B,T,H]
    Result Gather(Reshape(x, [-1, H]), logit_rows)"""
    graph = model.graph
    rows = next(value for value in graph.inputs if value.name == "logit_rows")
    gather = next((node for node in graph if node.op_type == "Gather" and _comes_from(node.inputs[1], rows)), None)
    flat = gather.inputs[0].producer() if gather is not None and gather.inputs[0] is not None else None
    if gather is None or flat is None or flat.op_type != "Reshape" or flat.outputs[0].shape is None:
        raise CaptureError(
            "the traced graph does not choose rows of logits by a Gather over flattened hidden states",
            where="logit_rows",
            got=gather.op_type if gather is not None and flat is None else flat.op_type if flat is not None else "no Gather",
            expected="Gather(Reshape(hidden), logit_rows)",
            fix="Install the versions of torch and onnxscript that constraints.txt names.",
        )
    width = flat.outputs[0].shape[1]
    tensor = ir.tensor([-1, width if isinstance(width, int) else -1], dtype=ir.DataType.INT64, name="row_shape")
    shape = ir.Value(name=tensor.name, shape=ir.Shape([2]), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(shape)
    flat.replace_input_with(1, shape)
    flat.attributes.pop("allowzero", None)  # no size is 0, and DirectML does not take it beside -1
    gather.replace_input_with(1, rows)
    RemoveUnusedNodesPass()(model)


def _comes_from(value: ir.Value | None, origin: ir.Value) -> bool:
    while value is not None and value is not origin:
        node = value.producer()
        value = node.inputs[0] if node is not None and node.inputs else None
    return value is origin


def _ir_dtype(dtype: torch.dtype) -> ir.DataType:
    return next(ir.DataType[kind.onnx] for kind in PLAIN if DTYPES[kind.short] == dtype)


def _name_dims(graph: ir.Graph, signature: Signature) -> None:
    """torch names symbolic sizes s12, s70, ...; give them the names of the field, read off the inputs."""
    known: dict[str, str] = {}
    expected = {name: given.dims for name, given in zip(signature.input_names, signature.inputs, strict=True)}
    for value in graph.inputs:
        names: tuple[str, ...] = expected.get(value.name or "", ())
        if value.name and value.name.endswith("pending_qkv"):
            names = ("B", "P")
        if value.shape is None:
            continue
        for dim, name in zip(value.shape, names, strict=False):
            if isinstance(dim, ir.SymbolicDim) and dim.value:
                known[dim.value] = name

    def named(dim: ir.SymbolicDim) -> str | None:
        return _SYMBOL.sub(lambda symbol: known.get(symbol[0], symbol[0]), dim.value) if dim.value else None

    seen = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in seen:
        if value.shape is not None:
            value.shape = ir.Shape([named(d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape])


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
