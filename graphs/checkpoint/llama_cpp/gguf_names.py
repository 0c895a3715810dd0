"""llama.cpp's names of tensors, and the weights of the modules that they hold.

    blk.N.attn_qkv ...                  layers.N.*, of which the last ones may be the layer of the draft head
    blk.N.ffn_gate_exps [E,I,H] ...     one matrix per expert, as transformers' save_pretrained writes them
    blk.N.nextn.*                       mtp.*
    blk.N.ssm_*                         linear_attn.*

Facts: `conversion/qwen.py` of llama.cpp. Norms are stored plus 1, but for the gated norm of a DeltaNet layer; A_log as -exp(A_log); the
convolution [C,1,K] as [C,K]; value heads in another order (`head_orders.py`), not in Qwen3-Next.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.formats.logical_tensor import LogicalTensor
from qwen_export.graphs.checkpoint.llama_cpp.gguf_header import GgufTensor
from qwen_export.graphs.checkpoint.llama_cpp.gguf_tensor import DECAY, ONE_ADDED, folded
from qwen_export.graphs.checkpoint.llama_cpp.head_orders import PartOfGroups, ValueHeads
from qwen_export.graphs.config import CheckpointConfig, TextConfig

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_EXPERTS = re.compile(r"ffn_(gate_up|gate|up|down)_exps\.weight")

_SAME = {
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_in.weight": "linear_attn.in_proj_qkvz.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
}
_NORMS = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
_DRAFT_NORMS = {
    "nextn.enorm.weight": "mtp.pre_fc_norm_embedding.weight",
    "nextn.hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
    "nextn.shared_head_norm.weight": "mtp.norm.weight",
}
_DRAFT_PRODUCT = "nextn.eh_proj.weight"
# Copies of embedding and head that drafts could use alone. Drafts are checked by the model: without them it says the same.
_DRAFT_COPIES = ("nextn.embed_tokens.weight", "nextn.shared_head_head.weight")
_VISION = ("v.", "mm.", "a.")


def weights_of(tensors: Mapping[str, GgufTensor], config: CheckpointConfig, *, tiled: bool) -> tuple[dict[str, LogicalTensor], list[str]]:
    """All weights of decoder and draft head under the names of a release, and notes on what is ignored. `tiled`: value heads are in the
    order of llama.cpp. Raises CheckpointError for tensors that belong to no part of the model."""
    names = _Names(config.text, tiled=tiled)
    found: dict[str, LogicalTensor] = {}
    ignored, unknown = [], []
    for name, stored in tensors.items():
        if name.startswith(_VISION):
            ignored.append(name)
            continue
        block = _BLOCK.fullmatch(name)
        weights = list(names.block(int(block[1]), block[2], stored, tensors) if block else names.outside(name, stored))
        if block and block[2] in _DRAFT_COPIES:
            ignored.append(name)
        elif not weights:
            unknown.append(name)
        for weight in weights:
            released = config.text_prefix + weight.name if not weight.name.startswith(("lm_head.", "mtp.")) else weight.name
            found[released] = replace(weight, name=released)
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors of the GGUF file belong to no part of the model",
            where=str(next(iter(tensors.values())).info.file),
            got=", ".join(unknown[:4]) + (", ..." if len(unknown) > 4 else ""),
            expected="the tensors that llama.cpp writes for this architecture",
            fix="Convert the model again with llama.cpp, or give its safetensors.",
        )
    notes = [f"ignored {len(ignored)} tensors of other parts: {', '.join(ignored[:3])}{', ...' if len(ignored) > 3 else ''}"]
    return found, notes if ignored else []


class _Names:
    def __init__(self, text: TextConfig, *, tiled: bool) -> None:
        self._text = text
        ratio = text.linear_num_value_heads // text.linear_num_key_heads
        self._ratio = ratio
        self._heads = ValueHeads(text.linear_num_key_heads, ratio if tiled else 1, text.linear_value_head_dim)

    def outside(self, name: str, stored: GgufTensor) -> Iterator[LogicalTensor]:
        """Of a tensor that is in no layer."""
        if name == EMBEDDING:
            yield folded("embed_tokens.weight", stored, stored.shape)
        elif name == HEAD:
            yield folded("lm_head.weight", stored, stored.shape)
        elif name == "output_norm.weight":
            yield folded("norm.weight", stored, stored.shape, fold=ONE_ADDED)

    def block(self, number: int, name: str, stored: GgufTensor, tensors: Mapping[str, GgufTensor]) -> Iterator[LogicalTensor]:
        """Of a tensor of one layer."""
        draft = number - self._text.num_layers
        prefix = f"mtp.layers.{draft}." if draft >= 0 else f"layers.{number}."
        experts = _EXPERTS.fullmatch(name)
        if name in _SAME:
            yield folded(prefix + _SAME[name], stored, stored.shape)
        elif name in _NORMS:
            yield folded(prefix + _NORMS[name], stored, stored.shape, fold=ONE_ADDED)
        elif name == "ffn_gate_inp_shexp.weight":
            yield folded(prefix + "mlp.shared_expert_gate.weight", stored, (1, stored.shape[-1]))
        elif experts is not None and len(stored.shape) == 3:
            yield from _experts(prefix + "mlp.experts.", experts[1], stored)
        elif draft >= 0:
            if name in _DRAFT_NORMS and draft == 0:
                yield folded(_DRAFT_NORMS[name], stored, stored.shape, fold=ONE_ADDED)
            elif name == _DRAFT_PRODUCT and draft == 0:
                yield folded("mtp.fc.weight", stored, stored.shape)
        else:
            yield from self._delta_net(prefix + "linear_attn.", name, stored, grouped=f"blk.{number}.ssm_in.weight" in tensors)

    def _delta_net(self, prefix: str, name: str, stored: GgufTensor, *, grouped: bool) -> Iterator[LogicalTensor]:
        text, heads, shape = self._text, self._heads, stored.shape
        behind_keys, single = replace(heads, first=2 * text.key_dim), replace(heads, size=1)
        if name == "attn_qkv.weight":
            yield folded(prefix + "in_proj_qkv.weight", stored, shape, behind_keys)
        elif name == "attn_gate.weight":
            yield folded(prefix + "in_proj_z.weight", stored, shape, heads)
        elif name == "ssm_conv1d.weight":
            yield folded(prefix + "conv1d.weight", stored, (shape[0], 1, *shape[1:]), behind_keys)
        elif name == "ssm_out.weight":
            yield folded(prefix + "out_proj.weight", stored, shape, columns_in=heads)
        elif name == "ssm_ba.weight" and grouped:
            yield folded(prefix + "in_proj_ba.weight", stored, shape)
        elif name == "ssm_ba.weight":
            for part, first in (("b", 0), ("a", self._ratio)):
                rows = PartOfGroups(2 * self._ratio, first, self._ratio)
                yield folded(f"{prefix}in_proj_{part}.weight", stored, (shape[0] // 2, *shape[1:]), rows)
        elif name in ("ssm_beta.weight", "ssm_alpha.weight"):
            yield folded(f"{prefix}in_proj_{'b' if 'beta' in name else 'a'}.weight", stored, shape, single)
        elif name in ("ssm_dt.bias", "ssm_dt"):
            yield folded(prefix + "dt_bias", stored, shape, single)
        elif name in ("ssm_a", "ssm_a.weight"):
            yield folded(prefix + "A_log", stored, shape, single, fold=DECAY)


def _experts(prefix: str, part: str, stored: GgufTensor) -> Iterator[LogicalTensor]:
    """The matrices of the experts one by one; "gate_up" has the rows of both on top of each other."""
    count, rows, columns = stored.shape
    names = ("gate", "up") if part == "gate_up" else (part,)
    height, nbytes = rows // len(names), stored.info.nbytes // (count * len(names))
    for number in range(count * len(names)):
        expert, half = divmod(number, len(names))
        info = replace(stored.info, shape=(height, *stored.info.shape[2:]), offset=stored.info.offset + number * nbytes)
        yield folded(f"{prefix}{expert}.{names[half]}_proj.weight", GgufTensor(stored.kind, (height, columns), info), (height, columns))
