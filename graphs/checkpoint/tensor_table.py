"""Which tensors a released checkpoint of a configuration holds: name, shape, stored dtype.

Names and shapes follow the released safetensors files: the text decoder under `model.language_model.` with `model.visual.` and `mtp.`
beside it, or, for a flat `ForCausalLM` configuration, under `model.`. Two things are stored in more than one way, see `LayerLayout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


class TensorEntry(NamedTuple):
    """One stored tensor. `dtype` is the safetensors name: BF16, F16 or F32."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class LayerLayout:
    """How a checkpoint stores one decoder layer.

    `fused_experts`: one 3-D tensor for all experts, as in the BF16 releases; else one matrix per expert, as in Qwen3-Next, in the FP8
    releases and as transformers' `save_pretrained` writes.
    `grouped_inputs`: the input projections of a DeltaNet layer are two matrices, in_proj_qkvz and in_proj_ba, whose rows are grouped by
    key head, as in Qwen3-Next; else four, in_proj_qkv, in_proj_z, in_proj_b and in_proj_a.
    """

    fused_experts: bool = True
    grouped_inputs: bool = False


@dataclass(frozen=True)
class Layout:
    """How a checkpoint stores the parameters of a configuration.

    `fp32_decay`: A_log and linear_attn.norm are F32, as in the 3.5 releases (3.6 and later store all in BF16).
    `fused_experts` and `grouped_inputs` as in `LayerLayout`; `fused_mtp_experts` is the former for the MTP layer: per expert in 3.5 and
    Qwen3-Next, fused in 3.6-35B-A3B.
    """

    dtype: str = "BF16"
    with_mtp: bool = True
    with_vision: bool = True
    fp32_decay: bool = True
    fused_experts: bool = True
    fused_mtp_experts: bool = False
    grouped_inputs: bool = False


def tensor_table(config: dict[str, Any], layout: Layout | None = None) -> Iterator[TensorEntry]:
    """All tensors of the checkpoint, in the order of the layers. `config` is a `config.json` dict of either form."""
    layout = layout or Layout()
    text = config.get("text_config", config)
    conditional = "text_config" in config
    decoder = "model.language_model." if conditional else "model."
    stored = LayerLayout(layout.fused_experts, layout.grouped_inputs)
    hidden, vocab = text["hidden_size"], text["vocab_size"]

    def default_dtype(tensors: Iterator[tuple[str, tuple[int, ...]]]) -> Iterator[TensorEntry]:
        for name, shape in tensors:
            fp32 = layout.fp32_decay and name.endswith((".linear_attn.A_log", ".linear_attn.norm.weight"))
            yield TensorEntry(name, shape, "F32" if fp32 else layout.dtype)

    def text_tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield decoder + "embed_tokens.weight", (vocab, hidden)
        for i, kind in enumerate(_layer_types(text)):
            yield from decoder_layer(f"{decoder}layers.{i}.", text, kind, stored)
        yield decoder + "norm.weight", (hidden,)
        if not config["tie_word_embeddings"]:
            yield "lm_head.weight", (vocab, hidden)

    yield from default_dtype(text_tensors())
    if layout.with_vision and "vision_config" in config:
        yield from default_dtype(vision_tower(config["vision_config"]))
    if layout.with_mtp and text.get("mtp_num_hidden_layers", text["model_type"] == "qwen3_next"):
        yield from default_dtype(_mtp(text, fused_experts=layout.fused_mtp_experts))


def _layer_types(text: dict[str, Any]) -> list[str]:
    """Kinds of the layers, which older configurations only give as an interval."""
    every, count = text.get("full_attention_interval", 4), text.get("num_hidden_layers", 0)
    return text.get("layer_types") or ["linear_attention" if (i + 1) % every else "full_attention" for i in range(count)]


def decoder_layer(
    prefix: str, text: dict[str, Any], kind: str, layout: LayerLayout = LayerLayout()
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of one decoder layer of `kind`, under any prefix (that of the MTP layer is `mtp.layers.0.`).

    `text` has the keys of a `config.json`; `num_experts` in it makes the layer a mixture of experts."""
    hidden = text["hidden_size"]
    yield prefix + "input_layernorm.weight", (hidden,)
    if kind == "linear_attention":
        yield from _linear_attention(prefix, text, grouped=layout.grouped_inputs)
    else:
        yield from _full_attention(prefix, text)
    yield prefix + "post_attention_layernorm.weight", (hidden,)
    if "num_experts" in text:
        yield from _experts(prefix + "mlp.", text, fused=layout.fused_experts)
    else:
        yield from _swiglu(prefix + "mlp.", hidden, text["intermediate_size"])


def _linear_attention(prefix: str, text: dict[str, Any], *, grouped: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, value_heads, dv = text["hidden_size"], text["linear_num_value_heads"], text["linear_value_head_dim"]
    channels = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"] + value_heads * dv
    prefix += "linear_attn."
    yield prefix + "A_log", (value_heads,)
    yield prefix + "conv1d.weight", (channels, 1, text["linear_conv_kernel_dim"])
    yield prefix + "dt_bias", (value_heads,)
    if grouped:
        yield prefix + "in_proj_ba.weight", (2 * value_heads, hidden)
        yield prefix + "in_proj_qkvz.weight", (channels + value_heads * dv, hidden)
    else:
        yield prefix + "in_proj_a.weight", (value_heads, hidden)
        yield prefix + "in_proj_b.weight", (value_heads, hidden)
        yield prefix + "in_proj_qkv.weight", (channels, hidden)
        yield prefix + "in_proj_z.weight", (value_heads * dv, hidden)
    yield prefix + "norm.weight", (dv,)
    yield prefix + "out_proj.weight", (hidden, value_heads * dv)


def _full_attention(prefix: str, text: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head_dim = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim
    prefix += "self_attn."
    yield prefix + "k_norm.weight", (head_dim,)
    yield prefix + "k_proj.weight", (keys, hidden)
    yield prefix + "o_proj.weight", (hidden, queries)
    yield prefix + "q_norm.weight", (head_dim,)
    yield prefix + "q_proj.weight", (2 * queries, hidden)  # query and gate of each head
    yield prefix + "v_proj.weight", (keys, hidden)


def _swiglu(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "down_proj.weight", (hidden, width)
    yield prefix + "gate_proj.weight", (width, hidden)
    yield prefix + "up_proj.weight", (width, hidden)


def _experts(prefix: str, text: dict[str, Any], *, fused: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width, count = text["hidden_size"], text["moe_intermediate_size"], text["num_experts"]
    if fused:
        yield prefix + "experts.down_proj", (count, hidden, width)
        yield prefix + "experts.gate_up_proj", (count, 2 * width, hidden)
    else:
        for e in range(count):
            yield from _swiglu(f"{prefix}experts.{e}.", hidden, width)
    yield prefix + "gate.weight", (count, hidden)
    yield from _swiglu(prefix + "shared_expert.", hidden, text["shared_expert_intermediate_size"])
    yield prefix + "shared_expert_gate.weight", (1, hidden)


def _mtp(text: dict[str, Any], *, fused_experts: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = text["hidden_size"]
    yield "mtp.fc.weight", (hidden, 2 * hidden)
    yield from decoder_layer("mtp.layers.0.", text, "full_attention", LayerLayout(fused_experts))
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield f"mtp.{name}.weight", (hidden,)


def vision_tower(vision: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a vision tower; `vision` has the keys of a vision_config."""
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = width * vision["spatial_merge_size"] ** 2

    def affine(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"model.visual.{name}.bias", shape[:1]
        yield f"model.visual.{name}.weight", shape

    for j in range(vision["depth"]):
        yield from affine(f"blocks.{j}.attn.proj", width, width)
        yield from affine(f"blocks.{j}.attn.qkv", 3 * width, width)
        yield from affine(f"blocks.{j}.mlp.linear_fc1", inner, width)
        yield from affine(f"blocks.{j}.mlp.linear_fc2", width, inner)
        yield from affine(f"blocks.{j}.norm1", width)
        yield from affine(f"blocks.{j}.norm2", width)
    yield from affine("merger.linear_fc1", merged, merged)
    yield from affine("merger.linear_fc2", vision["out_hidden_size"], merged)
    yield from affine("merger.norm", width)
    yield from affine("patch_embed.proj", width, vision["in_channels"], vision["temporal_patch_size"], patch, patch)
    yield "model.visual.pos_embed.weight", (vision["num_position_embeddings"], width)
