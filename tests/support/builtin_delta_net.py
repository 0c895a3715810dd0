"""gated_delta_net with pending tokens on ONNX Runtime's own CPU kernels, as one graph with dynamic shapes."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qwen_export.graphs.config import parse_config
from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from qwen_export.graphs.ops.op_schema import DOMAIN
from qwen_export.graphs.passes.lowering_choice import Choice
from qwen_export.graphs.passes.pass_context import PassContext, new_node
from qwen_export.graphs.weights.expression import StoredWeight, add_weight, weight_of
from qwen_export.plugins.onnxruntime.onnxruntime_lowerings import lower_mixers
from tests.support.cpu_delta_net import EPSILON, OUTPUTS, Array, Case, Shape
from tests.support.family import tiny_config
from tests.support.standard_graphs import Weights

_STATES = {"conv_history": "layers.0.conv_history", "state": "layers.0.recurrent"}
_WEIGHTS = ("conv_weight", "a_log", "dt_bias", "norm")


def tensors(case: Case) -> dict[str, Array]:
    """The op's inputs, of a case in the plugin's packed layout."""
    given, C, Hv = case.tensors, case.shape.C, case.shape.Hv
    made = {name: given[name] for name in ("dt_bias", "norm", "conv_history", "state", "accepted", "commit")}
    made |= {"conv_weight": given["conv_weight"].T, "a_log": np.log(-given["decay"])}
    made |= {"qkv": given["qkvz"][..., :C], "z": given["qkvz"][..., C:], "a": given["ab"][..., :Hv], "b": given["ab"][..., Hv:]}
    made["pending_qkv"] = given["pending_qkvz"][..., :C]
    made |= {"pending_a": given["pending_ab"][..., :Hv], "pending_b": given["pending_ab"][..., Hv:]}
    return {name: np.array(value, order="C") for name, value in made.items()}


def lowered(shape: Shape, weights: dict[str, Array]) -> ir.Model:
    """One op, lowered."""
    V, Hv = shape.Hv * shape.Dv, shape.Hv
    tokens = {"qkv": shape.C, "z": V, "b": Hv, "a": Hv}
    shapes: dict[str, list[int | str]] = {name: ["B", "T", width] for name, width in tokens.items()}
    shapes |= {f"pending_{name}": ["B", "P", tokens[name]] for name in ("qkv", "b", "a")} | {"accepted": ["B"], "commit": ["B"]}
    shapes |= {"conv_history": ["B", shape.K - 1, shape.C], "state": ["B", Hv, shape.Dk, shape.Dv]}
    graph = ir.Graph([], [], nodes=[], name="op", opset_imports={"": 21, "com.microsoft": 1, DOMAIN: 1})
    inputs: list[ir.Value] = []
    for name in gated_delta_net.inputs:
        if name in _WEIGHTS:
            inputs.append(add_weight(graph, f"layers.0.{name}", StoredWeight(name, weights[name].shape, ir.DataType.FLOAT)))
            continue
        dtype = ir.DataType.INT64 if name in ("accepted", "commit") else ir.DataType.FLOAT
        inputs.append(ir.Value(name=_STATES.get(name, name), shape=ir.Shape(shapes[name]), type=ir.TensorType(dtype)))
        graph.inputs.append(inputs[-1])
    node = new_node(DOMAIN, gated_delta_net.name, inputs, 3, dtype=ir.DataType.FLOAT, key_heads=shape.Hk, eps=EPSILON)
    graph.append(node)
    for value, name in zip(node.outputs, OUTPUTS, strict=True):
        value.name = name
        value.shape = ir.Shape(["B", "T", V] if name == "y" else shapes[name.removesuffix("_out")])
        graph.outputs.append(value)
    model = ir.Model(graph, ir_version=10)
    sizes = {"linear_num_key_heads": shape.Hk, "linear_num_value_heads": shape.Hv, "linear_conv_kernel_dim": shape.K}
    config = parse_config(tiny_config(**sizes, linear_key_head_dim=shape.Dk, linear_value_head_dim=shape.Dv)).text
    lower_mixers(model, PassContext(config, "fp32", {gated_delta_net.name: Choice("builtin_cpu", ())}, speculation=True))
    for value in graph.initializers.values():
        weight = weight_of(value)
        if weight is not None:
            value.const_value = ir.tensor(weight.evaluate(Weights(weights)), name=value.name)
    return model


def call(case: Case) -> dict[str, Array]:
    """The states are bound to the same memory as input and output, as the runtime does."""
    given = tensors(case)
    weights = {name: given.pop(name) for name in _WEIGHTS}
    session = _session(case.shape, tuple((name, value.tobytes(), value.shape) for name, value in weights.items()))
    held = {_STATES.get(name, name): ort.OrtValue.ortvalue_from_numpy(value) for name, value in given.items()}
    binding = session.io_binding()
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    places = {"conv_history_out": _STATES["conv_history"], "state_out": _STATES["state"]}
    for name, place in places.items():
        binding.bind_ortvalue_output(name, held[place])
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    return {name: held[place].numpy().copy() for name, place in places.items()} | {"y": binding.get_outputs()[2].numpy().copy()}


@cache
def _session(shape: Shape, weights: tuple[tuple[str, bytes, tuple[int, ...]], ...]) -> ort.InferenceSession:
    arrays = {name: np.frombuffer(data, np.float32).reshape(sizes) for name, data, sizes in weights}
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    model = ir.to_proto(lowered(shape, arrays))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
