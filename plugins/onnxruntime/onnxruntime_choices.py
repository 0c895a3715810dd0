"""Which lowering each op gets on ONNX Runtime: per device an ordered list, the first whose kernels are registered wins.

This module imports neither torch nor onnx: `inspect` uses it before anything is loaded.
"""

from __future__ import annotations

from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.passes.lowering_choice import Choice, Kernel
from qwen_export.plugins.native.native_library import NATIVE
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_kernels import Kernels

_MS, _AI = "com.microsoft", ""


def _rotary_limit(config: TextConfig) -> str:
    if config.rotary_dim % 16:
        return f"GroupQueryAttention rotates a multiple of 16 dimensions, and this model has {config.rotary_dim}"
    return ""


def _native_limit(config: TextConfig) -> str:
    """The CUDA kernels load 8 elements at a time."""
    widths = {
        "hidden size": config.hidden_size,
        "intermediate size": config.intermediate_size,
        "shared expert's width": config.shared_expert_intermediate_size,
        "attention width": config.num_attention_heads * config.head_dim,
        "key and value width": config.num_key_value_heads * config.head_dim,
        "DeltaNet width": config.value_dim,
        "DeltaNet projection": config.conv_dim + config.value_dim + 2 * config.linear_num_value_heads,
        "vocabulary": config.vocab_size,
    }
    odd = [f"{name} {width}" for name, width in widths.items() if width % 8]
    return f"the native products need multiples of 8, and this model has {', '.join(odd)}" if odd else ""


def _native_rows_limit(config: TextConfig) -> str:
    """Kernels that go over rows of the hidden size, 8 elements at a time."""
    return f"the native kernels take multiples of 8, and this model has hidden size {config.hidden_size}" if config.hidden_size % 8 else ""


def _native_moe_limit(config: TextConfig) -> str:
    if config.num_experts > 1024 or config.num_experts_per_tok > 32:
        return f"the native experts are up to 1024, 32 per token, and this model has {config.num_experts}, {config.num_experts_per_tok}"
    return ""


def _plugin_cuda_limit(config: TextConfig) -> str:
    """Its loads are of single elements of the projection and of four of the state: no width has to be a multiple of 8."""
    Dk, Dv, taps, Hk = config.linear_key_head_dim, config.linear_value_head_dim, config.linear_conv_kernel_dim, config.linear_num_key_heads
    if Dk != Dv or Dk not in (64, 128) or taps != 4 or Hk > 64:
        takes = "keys and values of 64 or of 128 values, 4 taps and at most 64 key heads"
        return f"the native DeltaNet takes {takes}, and this model has {Dk} and {Dv}, {taps} and {Hk}"
    return ""


def _plugin_attention_limit(config: TextConfig) -> str:
    """A lane of a warp has D / 32 values of a head, which turn with those of one other lane."""
    D, R = config.head_dim, config.rotary_dim
    if D not in (32, 64, 128, 256) or R % (D // 16):
        takes = "heads of 32, 64, 128 or 256 values, of which a multiple of a sixteenth turns"
        return f"the native attention takes {takes}, and this model has {D} and {R}"
    return ""


def _builtin_cuda_limit(config: TextConfig) -> str:
    """ONNX Runtime 1.31's CUDA kernel leaves a state [Dv,Dk], which only shows where they differ."""
    Dk, Dv = config.linear_key_head_dim, config.linear_value_head_dim
    return "" if Dk == Dv else f"ONNX Runtime's CUDA DeltaNet takes keys and values of one size, and this model has {Dk} and {Dv}"


def _plugin_cpu_limit(config: TextConfig) -> str:
    taps = config.linear_conv_kernel_dim
    return "" if 2 <= taps <= 4 else f"the native DeltaNet takes 2 to 4 taps, and this model has {taps}"


_NATIVE_LINEAR = (Kernel("Linear", NATIVE), Kernel("SwiGlu", NATIVE))
_SPLIT = Kernel("Split", _AI, ())
_SIMPLIFIED_NORM = Kernel("SimplifiedLayerNormalization", _AI, ())
_BUILTIN_NORM = Choice("simplified_norm", (_SIMPLIFIED_NORM, Kernel("SkipSimplifiedLayerNormalization")))
_CONV = Kernel("CausalConvWithState")
_GATED_NORM = Kernel("GatedRMSNorm")
_NATIVE_MOE = Choice("native_moe", (Kernel("Moe", NATIVE),))
_NATIVE_QUANT_MOE = Choice("native_quant_moe", (Kernel("QuantMoe", NATIVE),), _native_moe_limit, quantized_only=True)
_MICROSOFT_MOE = Choice("microsoft_moe", (Kernel("MoE"),))
_SHARED_EXPERT = Choice("native_shared_expert", (Kernel("SharedExpertSum", NATIVE),), _native_rows_limit)
_MIXTURE = Choice("native_mixture", (Kernel("QuantMixture", NATIVE),), _native_rows_limit, quantized_only=True)
_CHAIN = Choice("native_chain", (Kernel("Chain", NATIVE),))
_TOP_LOGITS = Choice("native_top_logits", (Kernel("TopLogits", NATIVE, ()),))
_WIDE_TOP_LOGITS = Choice("native_wide_top_logits", (Kernel("WideTopLogits", NATIVE),))
_MHA, _ROTARY = Kernel("MultiHeadAttention"), Kernel("RotaryEmbedding", fp32=())
_GQA = Kernel("GroupQueryAttention", activation=("T", "T_CACHE"))

CHOICES: dict[str, dict[str, tuple[Choice, ...]]] = {
    "cpu": {
        "linear": (Choice("native_linear", _NATIVE_LINEAR), Choice("fused_matmul", (Kernel("FusedMatMul"),))),
        "rms_norm": (_BUILTIN_NORM,),
        "silu": (Choice("quick_gelu", (Kernel("QuickGelu", activation=()),)),),
        "gated_delta_net": (
            Choice("plugin_cpu", (Kernel("DeltaNetTransaction", NATIVE),), _plugin_cpu_limit),
            Choice("builtin_cpu", (_CONV, Kernel("LinearAttentionGate", fp32=("TF",)), Kernel("LinearAttention"), _GATED_NORM, _SPLIT)),
        ),
        "gated_attention": (
            Choice("plugin_cpu", (Kernel("GatedAttention", NATIVE),), caches=("fp16", "int8", "fp8")),
            Choice("builtin_cpu", (_GQA, _SIMPLIFIED_NORM), _rotary_limit),
        ),
        "moe": (_NATIVE_MOE, _MICROSOFT_MOE),
        "top_logits": (_TOP_LOGITS,),
    },
    "cuda": {
        "linear": (
            Choice("native_linear", _NATIVE_LINEAR, _native_limit, columns=8, tail=True),
            Choice("fused_matmul", (Kernel("FusedMatMul"),)),
        ),
        "rms_norm": (Choice("native_norm", (Kernel("RmsNorm", NATIVE),), _native_rows_limit), _BUILTIN_NORM),
        "silu": (Choice("quick_gelu", (Kernel("QuickGelu"),)),),
        "gated_delta_net": (
            Choice("plugin_cuda", (Kernel("DeltaNet", NATIVE),), _plugin_cuda_limit),
            Choice(
                "builtin_cuda",
                (_CONV, Kernel("GatedDeltaNet", fp32=("TS",)), _GATED_NORM, _SPLIT),
                _builtin_cuda_limit,
                transaction=False,
            ),
        ),
        "gated_attention": (
            Choice(
                "plugin_cuda", (Kernel("GatedAttention", NATIVE),), _plugin_attention_limit, caches=("int8", "fp8"), cache_heads=(64, 256)
            ),
            Choice("builtin_cuda", (_GQA,), _rotary_limit),
        ),
        "moe": (_NATIVE_QUANT_MOE, _MICROSOFT_MOE),
        "shared_expert": (_SHARED_EXPERT,),
        "mixture": (_MIXTURE,),
        "top_logits": (_TOP_LOGITS,),
        "wide_top_logits": (_WIDE_TOP_LOGITS,),
        "chain": (_CHAIN,),
    },
}


_MULTI_HEAD = Choice("multi_head", (_MHA, _ROTARY, Kernel("Gelu", _AI), Kernel("LayerNormalization", _AI)))
_NATIVE_TOWER = Choice("native_tower", tuple(Kernel(op, NATIVE) for op in ("PictureAttention", "ResidualNorm", "BiasGelu")))
_PLACES = (Choice("scatter", (Kernel("ScatterND", _AI),)),)
# No scores are kept: on CUDA MultiHeadAttention is memory-efficient attention, which is far from what tensor cores can do.
VISION_CHOICES: dict[str, dict[str, tuple[Choice, ...]]] = {
    "cpu": {"picture_attention": (_MULTI_HEAD,), "place_features": _PLACES},
    "cuda": {"picture_attention": (_NATIVE_TOWER, _MULTI_HEAD), "place_features": _PLACES},
}
"""What a bundle that reads pictures needs besides."""


OF_MIXTURES = ("moe", "shared_expert", "mixture")
"""What only a mixture of experts has."""
OPTIONAL = ("top_logits", "wide_top_logits", "shared_expert", "mixture", "chain")
"""What a graph can be without."""


def choose(
    kernels: Kernels,
    precision: str,
    config: TextConfig,
    *,
    transaction: bool = False,
    quantized_experts: bool = False,
    caches: str = "",
) -> tuple[dict[str, Choice], list[str]]:
    """The lowering of each op that the model has, and a message for each op that has none. With `transaction` only lowerings that
    speculation can use; `caches` is the format of attention caches, "" for that of the activations."""
    chosen, refusals = {}, []
    for op, every in CHOICES[kernels.device].items():
        if op in OF_MIXTURES and not config.is_moe:
            continue
        candidates = [choice for choice in every if choice.transaction or not transaction]
        candidates = [choice for choice in candidates if quantized_experts or not choice.quantized_only]
        reasons = [_reason(candidate, kernels, precision, config) for candidate in candidates]
        if op == "gated_attention" and caches not in ("", precision):
            reasons = [reason or _cache_reason(choice, caches, config.head_dim) for choice, reason in zip(candidates, reasons, strict=True)]
        if "" in reasons:
            chosen[op] = candidates[reasons.index("")]
        elif op not in OPTIONAL:
            refusals.append(f"{op}: {'; or '.join(reasons)}")
    return chosen, refusals


def _cache_reason(choice: Choice, caches: str, head_dim: int) -> str:
    kernel = f"{choice.kernels[0].domain}.{choice.kernels[0].op}"
    if caches not in choice.caches:
        return f"{kernel} has no {caches} caches"
    if choice.cache_heads and head_dim not in choice.cache_heads:
        return (
            f"{kernel} has {caches} caches for heads of {' or '.join(map(str, choice.cache_heads))} values, and this model has {head_dim}"
        )
    return ""


def choose_vision(kernels: Kernels, precision: str) -> tuple[dict[str, Choice], list[str]]:
    """The lowering of each op of a bundle that reads pictures, and a message for each that has none."""
    chosen, refusals = {}, []
    if kernels.device not in VISION_CHOICES:
        return {}, [f"the vision tower has no lowering for device {kernels.device} yet"]
    for op, candidates in VISION_CHOICES[kernels.device].items():
        missing = [[k.message(precision) for k in choice.kernels if not k.available(kernels, precision)] for choice in candidates]
        if [] in missing:
            chosen[op] = candidates[missing.index([])]
        else:
            refusals.append(f"{op}: {kernels.source} has no {kernels.device} kernel of {'; or of '.join(map(', '.join, missing))}")
    return chosen, refusals


def _reason(choice: Choice, kernels: Kernels, precision: str, config: TextConfig) -> str:
    """Why the choice is out, "" when it is not."""
    missing = [k.message(precision) for k in choice.kernels if not k.available(kernels, precision)]
    if missing:
        return f"{kernels.source} has no {kernels.device} kernel of {', '.join(missing)}"
    return choice.limit(config)
