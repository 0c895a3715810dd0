"""The values of a decoder that keep a name of their own from the trace to the compiled graph: there the two can be compared.

A pass gives the values that replace a node's results their names, so a name stays as long as there is such a value. What a fusion swallows
has no name any more and is not compared. The stream between layers is always there, because two nodes read it.

    layers.3.mixer      what the mixer's output projection reads: attention or recurrence, gated       [B,T,Hv*Dv] or [B,T,Hq*D]
    layers.3.mixed      the residual stream behind the mixer                                           [B,T,hidden]
    layers.3.product    what down_proj reads: silu(gate) * up, in a mixture that of the shared expert  [B,T,intermediate]
    layers.3.output     the residual stream behind the layer                                           [B,T,hidden]
    embedding           what layer 0 reads                                                             [B,T,hidden]
"""

from __future__ import annotations

from qwen_export.graphs.config import FULL, TextConfig

EMBEDDING = "embedding"
MIXER, MIXED, PRODUCT, OUTPUT = "mixer", "mixed", "product", "output"
POINTS = (MIXER, MIXED, PRODUCT, OUTPUT)

READ_BY: dict[str, tuple[str, ...]] = {
    MIXER: ("linear_attn.out_proj", "self_attn.o_proj"),
    MIXED: ("post_attention_layernorm",),
    PRODUCT: ("mlp.down_proj", "mlp.shared_expert.down_proj"),
}
"""The points that are the input of a module, by its name within the layer; each layer has one of a point's modules."""


def point_name(layer: int, point: str) -> str:
    """`layers.3.output`."""
    return f"layers.{layer}.{point}"


def point_width(config: TextConfig, layer: int, point: str) -> int:
    """Values of a point per token."""
    if point == MIXER:
        full = config.layer_types[layer] == FULL
        return config.num_attention_heads * config.head_dim if full else config.value_dim
    if point == PRODUCT:
        return config.shared_expert_intermediate_size if config.is_moe else config.intermediate_size
    return config.hidden_size


def point_widths(config: TextConfig) -> dict[str, int]:
    """All points of a decoder and the values that each has per token, in the order of computation."""
    widths = {EMBEDDING: config.hidden_size}
    for layer in range(len(config.layer_types)):
        widths |= {point_name(layer, point): point_width(config, layer, point) for point in POINTS}
    return widths
