"""The targets: what each can do, and the ordered list of passes that lowers a captured graph to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")


@dataclass(frozen=True)
class Target:
    """One target. `devices` are the values of --device; `passes` are "module:function" names under qwen_export, in order."""

    name: str
    backend: str
    minimum_backend: str
    devices: tuple[str, ...]
    precisions: tuple[str, ...]
    passes: tuple[str, ...]


ONNXRUNTIME = Target(
    name="onnxruntime",
    backend="onnxruntime",
    minimum_backend="1.31.0",
    devices=("cpu", "cuda"),
    precisions=PRECISIONS,
    passes=(
        "graphs.passes.fold_transaction:fold_transaction",
        "graphs.passes.recognise_linear:recognise_linear",
        "graphs.passes.fold_weight_views:fold_weight_views",
        "graphs.passes.fuse_silu:fuse_silu",
        "graphs.passes.fuse_swiglu:fuse_swiglu",
        "graphs.passes.widen_logits:widen_logits",
        "plugins.onnxruntime.lowerings:lower_mixers",
        "graphs.passes.remove_dead:remove_dead",
        "graphs.passes.absorb_norm:absorb_norm",
        "graphs.passes.absorb_residual:absorb_residual",
        "graphs.passes.fuse_residual_norm:fuse_residual_norm",
        "plugins.onnxruntime.lowerings:lower_simple_ops",
        "plugins.onnxruntime.quantize_products:quantize_products",
        "plugins.onnxruntime.quantize_experts:quantize_experts",
        "graphs.passes.keep_stored_bf16:keep_stored_bf16",
        "graphs.passes.remove_dead:remove_dead",
    ),
)

TARGETS: dict[str, Target] = {target.name: target for target in (ONNXRUNTIME,)}


def pass_names(target: Target) -> Sequence[str]:
    """Short names of the target's passes, in order."""
    return [name.rsplit(":", 1)[1] for name in target.passes]
