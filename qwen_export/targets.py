"""The targets: what each has, and the ordered list of passes that lowers a captured graph to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8")
DECOMPOSABLE = ("rmsnorm",)
"""Values of --decompose: ops that have a node of their own in the standard, and that several simple nodes can replace."""
_WITHOUT_FP8 = PRECISIONS[:-1]


@dataclass(frozen=True)
class Target:
    """One target.

    `devices` are the values of --device. `passes` are "module:function" names under qwen_export, in order. A `static` target has a graph
    per size of call (`building/static_plan.py`). `opsets` are the versions of the standard to choose from, the default first.
    `prompt_tokens` is the default size of a prompt call, at most `longest_call`; within it the delta rule takes `delta_chunk` tokens at a
    time. `engines`: the graphs are compiled while the bundle is built. `fp32_products`: what products of fp32 round their operands to."""

    name: str
    backend: str
    minimum_backend: str
    devices: tuple[str, ...]
    precisions: tuple[str, ...]
    passes: tuple[str, ...]
    static: bool = False
    opsets: tuple[int, ...] = (21,)
    prompt_tokens: int = 64
    longest_call: int = 1024
    delta_chunk: int = 64
    engines: bool = False
    fp32_products: str = "fp32"


ONNXRUNTIME = Target(
    name="onnxruntime",
    backend="onnxruntime",
    minimum_backend="1.31.0",
    devices=("cpu", "cuda"),
    precisions=_WITHOUT_FP8,
    passes=(
        "graphs.passes.fold_transaction:fold_transaction",
        "graphs.passes.recognize_linear:recognize_linear",
        "graphs.passes.fold_weight_views:fold_weight_views",
        "plugins.onnxruntime.fuse_silu:fuse_silu",
        "plugins.onnxruntime.fuse_swiglu:fuse_swiglu",
        "graphs.passes.widen_logits:widen_logits",
        "plugins.onnxruntime.onnxruntime_lowerings:lower_mixers",
        "graphs.passes.remove_dead:remove_dead",
        "plugins.onnxruntime.absorb_norm:absorb_norm",
        "plugins.onnxruntime.absorb_residual:absorb_residual",
        "plugins.onnxruntime.fuse_residual_norm:fuse_residual_norm",
        "plugins.onnxruntime.onnxruntime_lowerings:lower_simple_ops",
        "plugins.onnxruntime.quantize_products:quantize_products",
        "plugins.onnxruntime.quantize_experts:quantize_experts",
        "plugins.onnxruntime.keep_stored_bf16:keep_stored_bf16",
        "plugins.onnxruntime.pick_top_logits:pick_top_logits",
        "graphs.passes.remove_dead:remove_dead",
    ),
)

_STANDARD_PASSES = (
    "plugins.standard.fix_sizes:fix_sizes",
    "graphs.passes.recognize_linear:recognize_linear",
    "graphs.passes.fold_weight_views:fold_weight_views",
    "graphs.passes.widen_logits:widen_logits",
    "plugins.standard.standard_lowerings:lower_mixers",
    "graphs.passes.remove_dead:remove_dead",
    "plugins.standard.standard_lowerings:lower_simple_ops",
    "plugins.standard.standard_quantized:quantize_embedding",
    "graphs.passes.remove_dead:remove_dead",
    "plugins.standard.stamp_opset:stamp_opset",
)

ONNX = Target(
    name="onnx",
    backend="onnxruntime",
    minimum_backend="1.22.0",
    devices=("cpu",),
    precisions=("fp32", "fp16", "int8", "int4"),
    passes=(*_STANDARD_PASSES, "plugins.standard.check_standard:check_standard"),
    static=True,
    opsets=(21, 18, 19, 20, 22, 23, 24),
    prompt_tokens=256,
    delta_chunk=32,
)

DIRECTML = Target(
    name="directml",
    backend="onnxruntime",
    minimum_backend="1.22.0",
    devices=("dml",),
    precisions=("fp16", "fp32", "int8", "int4"),
    passes=(*_STANDARD_PASSES, "plugins.directml.check_operators:check_operators"),
    static=True,
    opsets=(20, 21),
)

TENSORRT = Target(
    name="tensorrt",
    backend="tensorrt",
    minimum_backend="10.15",
    devices=("cuda",),
    precisions=("fp16", "bf16", "fp32", "int8", "int4", "fp8"),
    passes=(
        "plugins.standard.fix_sizes:fix_sizes",
        "graphs.passes.recognize_linear:recognize_linear",
        "graphs.passes.fold_weight_views:fold_weight_views",
        "graphs.passes.widen_logits:widen_logits",
        "plugins.tensorrt.tensorrt_lowerings:lower_mixers",
        "graphs.passes.remove_dead:remove_dead",
        "plugins.tensorrt.merge_products:merge_products",
        "plugins.tensorrt.merge_products:own_head",
        "plugins.tensorrt.tensorrt_lowerings:lower_simple_ops",
        "plugins.tensorrt.add_top_logits:add_top_logits",
        "graphs.passes.remove_dead:remove_dead",
        "plugins.standard.stamp_opset:stamp_opset",
        "plugins.standard.check_standard:check_standard",
    ),
    static=True,
    opsets=(24,),
    prompt_tokens=512,
    longest_call=4096,
    engines=True,
)

TENSORRT_RTX = replace(TENSORRT, name="tensorrt-rtx", backend="tensorrt-rtx", minimum_backend="1.5", fp32_products="tf32")

TARGETS: dict[str, Target] = {target.name: target for target in (ONNXRUNTIME, ONNX, DIRECTML, TENSORRT, TENSORRT_RTX)}


def pass_names(target: Target) -> Sequence[str]:
    """Short names of the target's passes, in order."""
    return [name.rsplit(":", 1)[1] for name in target.passes]
