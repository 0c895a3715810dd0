"""Products and gathers over matrices that the precision plan quantizes, on the kernels of plugins/native/cpu/quant_linear_op.cc,
plugins/native/quant_ops.cc and plugins/native/fp8_ops.cc."""

from __future__ import annotations

import onnx_ir as ir

from qwen_export.errors import ConfigError
from qwen_export.graphs.passes.pass_context import PassContext, new_node, replace_node
from qwen_export.graphs.passes.pass_outcome import Outcome
from qwen_export.graphs.passes.recognize_linear import LINEAR as LINEAR_OP
from qwen_export.graphs.quantization.precision_plan import GroupFormat, PrecisionPlan
from qwen_export.graphs.weights.expression import Stacked, Weight, add_weight, weight_of
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.plugins.onnxruntime.linear_plugin import LINEAR, SWIGLU, is_native
from qwen_export.plugins.onnxruntime.quantized_forms import FORMS
from qwen_export.plugins.rewrite import ONE_FORMAT

# Of the inputs behind the matrix: residual, norm, tail.
_TAIL_INPUT = 2


def quantize_products(model: ir.Model, context: PassContext) -> Outcome:
    """Given  qwen.native::Linear(x, w, residual, norm), SwiGlu(x, w, norm), Gather(w, ids)       w a matrix that the plan quantizes
    Result qwen.native::QuantLinear(x, packed, residual, norm), QuantSwiGlu(x, packed, norm), QuantGather(ids, packed), or, in fp8,
           Fp8Linear(x, codes, scales, residual, norm) and so on
           for a stack of matrices of which some are quantized: a product each, and Concat; on kernels that take a tail, one product
           QuantLinear(x, packed, residual, norm, tail) where those that are not quantized are the last

    A matrix that is read twice, as a tied embedding is, is packed once."""
    plan, outcome = context.quantization, Outcome()
    if plan is None:
        return Outcome.nothing("nothing is quantized")
    for node in list(model.graph):
        if is_native(node, LINEAR, SWIGLU):
            changed = _product(model.graph, node, plan, tail=context.choices[LINEAR_OP].tail)
        elif node.op_type == "Gather" and not node.domain and weight_of(node.inputs[0]) is not None:
            changed = _gather(model.graph, node, plan)
        else:
            continue
        if changed:
            outcome.changed += 1
        else:
            outcome.skip(node, "the precision plan keeps its matrix as it is stored")
    return outcome


def _product(graph: ir.Graph, node: ir.Node, plan: PrecisionPlan, *, tail: bool) -> bool:
    value = node.inputs[1]
    weight = weight_of(value)
    if value is None or value.name is None or weight is None:
        return False
    parts = _by_format(weight, plan)
    if len(parts) == 1:
        if not parts[0][0].quantized:
            return False
        made = _quantized(graph, node, value.name, plan, *parts[0])
        replace_node(graph, node, [made], made.outputs)
        return True
    if node.op_type == SWIGLU:
        raise ConfigError(
            "a plan must give gate_proj and up_proj of a layer one format",
            where=value.name,
            got=", ".join(str(f) for f, _ in parts),
            fix=ONE_FORMAT,
        )
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        raise ConfigError("a plan must give all parts of a product with a residual one format", where=value.name, fix=ONE_FORMAT)
    if tail and [format.quantized for format, _ in parts] == [True, False]:
        made = _quantized(graph, node, value.name, plan, *parts[0], tail=add_weight(graph, f"{value.name}.tail", parts[1][1]))
        replace_node(graph, node, [made], made.outputs)
        return True
    nodes = []
    for index, (format, part) in enumerate(parts):
        name = f"{value.name}.{index}"
        if format.quantized:
            nodes.append(_quantized(graph, node, name, plan, format, part))
        else:
            inputs = [node.inputs[0], add_weight(graph, name, part), *node.inputs[2:]]
            nodes.append(new_node(NATIVE, LINEAR, inputs, like=node.outputs[0], epsilon=node.attributes.get_float("epsilon")))
    whole = new_node("", "Concat", [made.outputs[0] for made in nodes], like=node.outputs[0], axis=-1)
    whole.outputs[0].shape = node.outputs[0].shape
    replace_node(graph, node, [*nodes, whole], whole.outputs)
    return True


def _quantized(
    graph: ir.Graph, node: ir.Node, name: str, plan: PrecisionPlan, chosen: GroupFormat, weight: Weight, tail: ir.Value | None = None
) -> ir.Node:
    """The quantized form of a product, over `weight`, with the rows of `tail` behind."""
    form = FORMS[chosen.format]
    matrix, attributes = form.matrix(graph, name, weight, plan)
    others = [*node.inputs[2:]]
    if tail is not None:
        others += [None] * (_TAIL_INPUT - len(others)) + [tail]
    made = new_node(
        NATIVE,
        form.linear if node.op_type == LINEAR else form.swiglu,
        [node.inputs[0], *matrix, *others],
        like=node.outputs[0],
        epsilon=node.attributes.get_float("epsilon"),
        **attributes,  # type: ignore[arg-type]
    )
    made.outputs[0].shape = node.outputs[0].shape
    return made


def _gather(graph: ir.Graph, node: ir.Node, plan: PrecisionPlan) -> bool:
    value = node.inputs[0]
    weight = weight_of(value)
    columns = "axis" in node.attributes and node.attributes.get_int("axis") != 0
    if value is None or value.name is None or weight is None or len(weight.shape) != 2 or columns:
        return False
    ((chosen, _),) = _by_format(weight, plan)
    if not chosen.quantized:
        return False
    form = FORMS[chosen.format]
    matrix, attributes = form.matrix(graph, value.name, weight, plan)
    made = new_node(NATIVE, form.gather, [node.inputs[1], *matrix], like=node.outputs[0], **attributes)  # type: ignore[arg-type]
    made.outputs[0].shape = node.outputs[0].shape
    replace_node(graph, node, [made], made.outputs)
    return True


def _by_format(weight: Weight, plan: PrecisionPlan) -> list[tuple[GroupFormat, Weight]]:
    """The weight cut where the format changes."""
    parts: list[tuple[GroupFormat, list[Weight]]] = []
    for part in weight.parts if isinstance(weight, Stacked) else (weight,):
        format = plan.of_weight(part)
        if parts and parts[-1][0] == format:
            parts[-1][1].append(part)
        else:
            parts.append((format, [part]))
    return [(format, several[0] if len(several) == 1 else Stacked(tuple(several))) for format, several in parts]
