"""From the parameters of the modules to the tensors that the checkpoint stores for them.

Most parameters are stored as they are. Two are not, in some releases (`graphs.checkpoint.tensor_table.LayerLayout`):

* experts.gate_up_proj [E,2I,H] and experts.down_proj [E,H,I] as matrices of one expert each,
  experts.e.{gate,up}_proj.weight [I,H] and experts.e.down_proj.weight [H,I];
* the four input projections of a DeltaNet layer as two, whose rows are grouped by key head (Hk groups, r = Hv/Hk value heads each):
  in_proj_qkvz: q Dk | k Dk | v r Dv | z r Dv, and in_proj_ba: b r | a r. (transformers: Qwen3NextGatedDeltaNet)
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qwen_export.graphs.checkpoint.tensor_names import StoredLayout
from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.weights.expression import HeadRows, Stacked, StackedMatrices, StoredWeight, Weight, WeightTensor, weight_of

_EXPERTS, _INPUTS = "mlp.experts.", "linear_attn.in_proj_"


def parameter_weight(config: TextConfig, stored: StoredLayout, name: str, shape: tuple[int, ...], dtype: ir.DataType) -> Weight:
    """The weight of the parameter `name`, over the tensors that the checkpoint has. All names are those of the modules. The parameter may
    be of any layer, also of `mtp.layers.0.`."""
    if _EXPERTS in name:
        prefix, part = name.split(_EXPERTS)
        if not stored.layer(prefix).fused_experts:
            return _experts(config, prefix + _EXPERTS, part, dtype, name)
    elif _INPUTS in name:
        prefix, part = name.split(_INPUTS)
        if stored.layer(prefix).grouped_inputs:
            return _input_projection(config, prefix + _INPUTS, part.removesuffix(".weight"), dtype, name)
    return StoredWeight(name, shape, dtype)


def resolve_layout(model: ir.Model, config: TextConfig, stored: StoredLayout) -> int:
    """Given  initializers that are parameters, each a StoredWeight of the parameter's name
    Result the same initializers over the tensors that the checkpoint has; returns how many changed."""
    changed = 0
    for value in model.graph.initializers.values():
        weight = weight_of(value)
        if not isinstance(weight, StoredWeight):
            continue
        resolved = parameter_weight(config, stored, weight.name, weight.shape, weight.dtype)
        if resolved.shape != weight.shape:
            raise AssertionError(f"{weight.name} is {weight.shape}, and the checkpoint's tensors make {resolved.shape}")
        if resolved != weight:
            value.const_value = WeightTensor(resolved, value.name or weight.name)
            changed += 1
    return changed


def _experts(config: TextConfig, prefix: str, part: str, dtype: ir.DataType, parameter: str) -> Weight:
    H, inner = config.hidden_size, config.moe_intermediate_size

    def matrix(expert: int, name: str, shape: tuple[int, int]) -> Weight:
        return StoredWeight(f"{prefix}{expert}.{name}.weight", shape, dtype, parameter)

    def gate_up(expert: int) -> Weight:
        return Stacked((matrix(expert, "gate_proj", (inner, H)), matrix(expert, "up_proj", (inner, H))))

    def down(expert: int) -> Weight:
        return matrix(expert, "down_proj", (H, inner))

    parts: dict[str, Callable[[int], Weight]] = {"gate_up_proj": gate_up, "down_proj": down}
    return StackedMatrices(tuple(parts[part](expert) for expert in range(config.num_experts)))


def _input_projection(config: TextConfig, prefix: str, part: str, dtype: ir.DataType, parameter: str) -> Weight:
    H, Hk, Hv = config.hidden_size, config.linear_num_key_heads, config.linear_num_value_heads
    Dk, values, ratio = config.linear_key_head_dim, Hv // Hk * config.linear_value_head_dim, Hv // Hk
    qkvz, ba = 2 * Dk + 2 * values, 2 * ratio

    def rows(name: str, group: int, first: int, take: int) -> Weight:
        return HeadRows(StoredWeight(f"{prefix}{name}.weight", (Hk * group, H), dtype, parameter), group, first, take)

    if part == "qkv":
        return Stacked((rows("qkvz", qkvz, 0, Dk), rows("qkvz", qkvz, Dk, Dk), rows("qkvz", qkvz, 2 * Dk, values)))
    if part == "z":
        return rows("qkvz", qkvz, 2 * Dk + values, values)
    return rows("ba", ba, {"b": 0, "a": ratio}[part], ratio)
