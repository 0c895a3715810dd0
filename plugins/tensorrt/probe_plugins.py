"""Whether this TensorRT takes our plugins: tested before a build reads weights."""

from __future__ import annotations

from dataclasses import asdict

import onnx

from qwen_export.errors import UnsupportedError
from qwen_export.runtimes.backends.tensorrt.delta_net_plugin import NAMESPACE, RESULTS, STEP, TENSORS, VERSION, StepFields
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import AOT_PLUGINS, Library


def ensure_taken(library: Library) -> None:
    """Raises UnsupportedError where the parser, which is a library of its own, refuses plugins that the library knows."""
    if not library.has(AOT_PLUGINS) and not parses(library):
        raise UnsupportedError(
            f"{library.flavour.name} takes plugins of others since 1.7",
            got=library.version,
            fix="Install a newer one, or leave out {plugins}.",
        )


def parses(library: Library) -> bool:
    floats = onnx.TensorProto.FLOAT
    names, results = list(TENSORS[STEP]), [f"{name}.next" for name in RESULTS]
    fields = asdict(StepFields("", "", 1, 0, 1, 1, 64, 0))
    node = onnx.helper.make_node(STEP, names, results, domain=NAMESPACE, plugin_namespace=NAMESPACE, plugin_version=VERSION, **fields)
    inputs = [onnx.helper.make_tensor_value_info(name, floats, [1, 1, 1]) for name in names]
    outputs = [onnx.helper.make_tensor_value_info(name, floats, None) for name in results]
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid(NAMESPACE, 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "probe", inputs, outputs), opset_imports=opsets)
    network = library.api.Builder(library.log).create_network(0)
    taken = bool(library.api.OnnxParser(network, library.log).parse(model.SerializeToString()))
    library.take_messages()
    return taken
