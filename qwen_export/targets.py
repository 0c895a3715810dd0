"""The targets: what each has, and the ordered list of passes that lowers a captured graph to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8")
DECOMPOSABLE = ("rmsnorm",)
"""Values of --decompose: ops that have a node of their own in the standard, and that several simple nodes can replace."""
BUILT_IN_TEXT = "built-in"
"""The value of --calibrate that stands for the text of this package."""


class PassStep(NamedTuple):
    """One pass of a target. `function` is "module:function" under qwen_export, `why` is the reason for its place in the list.

    `finds` is what the pass must find: a pass that changes nothing, and gives no reason for that, is an error. Empty: it may find nothing.
    `every`: a candidate that it leaves as it was is an error, too."""

    function: str
    why: str
    finds: str = ""
    every: bool = False

    @property
    def name(self) -> str:
        return self.function.rpartition(":")[2]


@dataclass(frozen=True)
class Target:
    """One target.

    `devices` are the values of {device}. `passes` lower a captured graph, in order. A `static` target has a graph per size of call
    (`building/static_plan.py`). `opsets` are the versions of the standard to choose from, the default first. `prompt_tokens` is the
    default size of a prompt call, at most `longest_call`; within it the delta rule takes `delta_chunk` tokens at a time. `engines`: the
    graphs are compiled while the bundle is built. `fp32_products`: what products of fp32 round their operands to."""

    name: str
    backend: str
    minimum_backend: str
    devices: tuple[str, ...]
    precisions: tuple[str, ...]
    passes: tuple[PassStep, ...]
    static: bool = False
    opsets: tuple[int, ...] = (21,)
    prompt_tokens: int = 64
    longest_call: int = 1024
    delta_chunk: int = 64
    engines: bool = False
    fp32_products: str = "fp32"
    fp8_block: int = 128
    """So many rows and columns share a scale of an fp8 matrix; 0: the values of a row."""
    vision_passes: tuple[PassStep, ...] = ()
    """The same for the vision tower; empty: the target reads no pictures."""
    vision_unasked: bool = True
    """Whether a build has the tower where nothing is said about it."""


_REMOVE_DEAD = "graphs.passes.remove_dead:remove_dead"
_RECOGNIZE_LINEAR = PassStep(
    "graphs.passes.recognize_linear:recognize_linear",
    "first of the rewrites: all later ones look for qwen::linear, not for MatMul",
    finds="products of activations with stored weights",
    every=True,
)
_FOLD_VIEWS = PassStep(
    "graphs.passes.fold_weight_views:fold_weight_views",
    "before the mixers: their lowerings read the convolution's weight as an initializer",
)
_WIDEN_LOGITS = PassStep("graphs.passes.widen_logits:widen_logits", "before the largest logits are picked, which reads fp32")

ONNXRUNTIME = Target(
    name="onnxruntime",
    backend="onnxruntime",
    minimum_backend="1.31.0",
    devices=("cpu", "cuda"),
    precisions=PRECISIONS,
    passes=(
        PassStep(
            "graphs.passes.fold_transaction:fold_transaction",
            "first: without speculation no later pass has to know of pending tokens",
            finds="gated_delta_net nodes",
        ),
        _RECOGNIZE_LINEAR,
        _FOLD_VIEWS,
        PassStep(
            "plugins.onnxruntime.fuse_silu:fuse_silu",
            "before the mixers, whose output gates also are a Sigmoid and a Mul",
            finds="x * sigmoid(x) of the MLPs",
        ),
        PassStep(
            "plugins.onnxruntime.fuse_swiglu:fuse_swiglu",
            "after fuse_silu, which makes its input; before products take norms, so that one node takes the norm of both halves",
            finds="gated MLPs",
        ),
        _WIDEN_LOGITS,
        PassStep(
            "plugins.onnxruntime.onnxruntime_lowerings:lower_mixers",
            "before the linears: a mixer regroups the projections that feed it",
            finds="gated_delta_net or gated_attention",
        ),
        PassStep(
            "plugins.onnxruntime.fuse_shared_expert:fuse_shared_expert",
            "while the gate's product still is a qwen::linear and the experts are qwen::moe; before fuse_residual_norm, which would take "
            "the addition of the residual",
            finds="sums of a mixture and its shared expert",
        ),
        PassStep(
            _REMOVE_DEAD,
            "what was regrouped or replaced so far is read by nothing, but still counts as a reader of the norm",
        ),
        PassStep(
            "plugins.onnxruntime.absorb_norm:absorb_norm",
            "after remove_dead, which leaves the true readers of a norm; before absorb_residual, which makes products of another form",
        ),
        PassStep(
            "plugins.onnxruntime.absorb_residual:absorb_residual",
            "before fuse_residual_norm, which would take the same additions",
            finds="additions to the residual stream",
        ),
        PassStep("plugins.onnxruntime.fuse_residual_norm:fuse_residual_norm", "takes the additions and norms that no product has absorbed"),
        PassStep(
            "plugins.onnxruntime.onnxruntime_lowerings:lower_simple_ops",
            "after every pass that looks for qwen::linear and qwen::rms_norm",
            finds="linear",
        ),
        PassStep("plugins.onnxruntime.quantize_products:quantize_products", "rewrites the plugin's products, which exist from here on"),
        PassStep("plugins.onnxruntime.quantize_experts:quantize_experts", "rewrites the plugin's Moe, which exists from here on"),
        PassStep("plugins.onnxruntime.fuse_mixture:fuse_mixture", "joins what quantize_products and quantize_experts make"),
        PassStep(
            "plugins.onnxruntime.keep_stored_bf16:keep_stored_bf16",
            "after quantization: it is for the matrices that are not quantized",
        ),
        PassStep("plugins.onnxruntime.pick_top_logits:pick_top_logits", "last, so that no pass moves the outputs behind it"),
        PassStep(_REMOVE_DEAD, "weights that were replaced by packed or folded ones would be written otherwise"),
        PassStep(
            "plugins.onnxruntime.chain_steps:chain_steps",
            "last: it decides on the readers of every value, and no other pass looks into a chain",
        ),
    ),
    vision_passes=(
        _RECOGNIZE_LINEAR,
        PassStep(
            "plugins.onnxruntime.onnxruntime_lowerings:lower_tower",
            "after the products are recognized, and with them in one walk over the graph",
            finds="picture_attention",
        ),
        PassStep(
            "plugins.onnxruntime.fuse_tower_rows:fuse_tower_rows", "after lower_tower, whose attention takes the bias of its projection"
        ),
        PassStep("plugins.onnxruntime.quantize_products:quantize_products", "rewrites the plugin's products, which exist from here on"),
        PassStep(
            "plugins.onnxruntime.keep_stored_bf16:keep_stored_bf16",
            "after quantization: it is for the matrices that are not quantized",
        ),
        PassStep(_REMOVE_DEAD, "weights that were replaced by packed ones would be written otherwise"),
    ),
)

_FIX_SIZES = PassStep(
    "plugins.standard.fix_sizes:fix_sizes",
    "first: every later pass of a static target reads sizes",
    finds="values with dynamic sizes",
)
_REGROUPED = PassStep(_REMOVE_DEAD, "projections that a mixer has regrouped would be lowered, too")
_REPLACED = PassStep(_REMOVE_DEAD, "weights that were replaced would be written otherwise")
_STAMP_OPSET = PassStep(
    "plugins.standard.stamp_opset:stamp_opset", "after all rewrites, before the check that reads the version", finds="a graph"
)

_DEFINE_NBITS = PassStep(
    "plugins.standard.nbits_function:define_nbits", "before the check, which takes other operators with a function only"
)
_CHECK_STANDARD = PassStep("plugins.standard.check_standard:check_standard", "last: it checks what is written")
_CHECK_DIRECTML = PassStep("plugins.directml.check_operators:check_operators", "last: it checks what is written")
_OWN_MEMORY = (
    PassStep("plugins.directml.gather_parts:gather_parts", "after all rewrites: it decides on the readers of a value"),
    PassStep(
        "plugins.directml.unshare_concat:unshare_concat", "the same; after gather_parts, since its Split gives a value a second reader"
    ),
)

_STANDARD_REWRITES = (
    _FIX_SIZES,
    _RECOGNIZE_LINEAR,
    _FOLD_VIEWS,
    _WIDEN_LOGITS,
    PassStep(
        "plugins.standard.standard_lowerings:lower_mixers",
        "before the linears: a mixer regroups the projections that feed it",
        finds="gated_delta_net or gated_attention",
    ),
    _REGROUPED,
    PassStep("plugins.standard.standard_lowerings:lower_simple_ops", "after the mixers, which make linears", finds="linear"),
    PassStep(
        "plugins.standard.standard_quantized:quantize_embedding",
        "after the products: a tied embedding shares the codes of the LM head",
    ),
    _REPLACED,
)

_FOLD_SHAPES = PassStep(
    "plugins.standard.fold_shapes:fold_shapes", "first: later passes read constants where the trace computes them", finds="constants"
)
_TOWER_WHY = "after the products are recognized, and with them in one walk over the graph"
_DECOMPOSE_GELU = PassStep("plugins.standard.standard_pictures:decompose_gelu", "anywhere: nothing else looks for Gelu", finds="Gelu")

_STANDARD_TOWER = (
    _FOLD_SHAPES,
    _RECOGNIZE_LINEAR,
    PassStep("plugins.standard.standard_lowerings:lower_tower", _TOWER_WHY, finds="picture_attention"),
    _DECOMPOSE_GELU,
    _REPLACED,
)

ONNX = Target(
    name="onnx",
    backend="onnxruntime",
    minimum_backend="1.22.0",
    devices=("cpu",),
    precisions=("fp32", "fp16", "int8", "int4"),
    passes=(*_STANDARD_REWRITES, _STAMP_OPSET, _DEFINE_NBITS, _CHECK_STANDARD),
    vision_passes=(*_STANDARD_TOWER, _STAMP_OPSET, _DEFINE_NBITS, _CHECK_STANDARD),
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
    passes=(*_STANDARD_REWRITES, *_OWN_MEMORY, _STAMP_OPSET, _CHECK_DIRECTML),
    vision_passes=(*_STANDARD_TOWER, *_OWN_MEMORY, _STAMP_OPSET, _CHECK_DIRECTML),
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
        _FIX_SIZES,
        _RECOGNIZE_LINEAR,
        _FOLD_VIEWS,
        _WIDEN_LOGITS,
        PassStep(
            "plugins.tensorrt.tensorrt_lowerings:lower_mixers",
            "before the linears: a mixer regroups the projections that feed it",
            finds="gated_delta_net or gated_attention",
        ),
        PassStep(_REMOVE_DEAD, "projections that a mixer has regrouped would be merged with the others"),
        PassStep("plugins.tensorrt.merge_products:merge_products", "while products still are qwen::linear over one weight each"),
        PassStep("plugins.tensorrt.merge_products:own_head", "while the head still is a qwen::linear"),
        PassStep("plugins.tensorrt.tensorrt_lowerings:lower_simple_ops", "after every pass that looks for qwen::linear", finds="linear"),
        PassStep("plugins.tensorrt.add_top_logits:add_top_logits", "after the rewrites, so that no pass moves the outputs behind it"),
        _REPLACED,
        _STAMP_OPSET,
        _CHECK_STANDARD,
    ),
    vision_passes=(
        _FOLD_SHAPES,
        _RECOGNIZE_LINEAR,
        PassStep("plugins.tensorrt.tensorrt_lowerings:lower_tower", _TOWER_WHY, finds="picture_attention"),
        _DECOMPOSE_GELU,
        _REPLACED,
        _STAMP_OPSET,
        _CHECK_STANDARD,
    ),
    vision_unasked=False,  # its engines have been built, and not been run
    static=True,
    opsets=(24,),
    prompt_tokens=512,
    longest_call=4096,
    engines=True,
    fp8_block=0,
)

TENSORRT_RTX = replace(TENSORRT, name="tensorrt-rtx", backend="tensorrt-rtx", minimum_backend="1.5", fp32_products="tf32")

TARGETS: dict[str, Target] = {target.name: target for target in (ONNXRUNTIME, ONNX, DIRECTML, TENSORRT, TENSORRT_RTX)}
