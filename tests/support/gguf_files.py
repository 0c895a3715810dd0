"""GGUF files for tests, written with the `gguf` package from a checkpoint directory, folded and named as llama.cpp's converter does it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from tests.support.source_tree import ROOT

DENSE, MOE = ROOT / "examples" / "demo-dense", ROOT / "examples" / "demo-moe"
ARCHITECTURES = {DENSE: "qwen35", MOE: "qwen35moe"}
Array = npt.NDArray[Any]
KindOf = Callable[[str, tuple[int, ...]], Kind]
"""The element type of a tensor, by its name in the file and its shape."""

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
_DRAFT = {
    "fc.weight": "nextn.eh_proj.weight",
    "pre_fc_norm_embedding.weight": "nextn.enorm.weight",
    "pre_fc_norm_hidden.weight": "nextn.hnorm.weight",
    "norm.weight": "nextn.shared_head_norm.weight",
}
_OUTSIDE = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
_EXPERT = re.compile(r"(.*mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")


def matrices(kind: Kind) -> KindOf:
    """`kind` for all products that have room for its blocks, fp32 for the rest, as llama.cpp leaves it."""
    block = gguf.GGML_QUANT_SIZES[kind][0]

    def chosen(name: str, shape: tuple[int, ...]) -> Kind:
        small = len(shape) < 2 or "norm" in name or "ssm_conv1d" in name or "ffn_gate_inp" in name
        return Kind.F32 if small or shape[-1] % block else kind

    return chosen


def checkpoint_tensors(source: Path) -> dict[str, Array]:
    """All tensors of a checkpoint directory in fp32, without the prefix of the decoder, experts of a layer in one tensor."""
    tensors: dict[str, Array] = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, value in load_file(file).items():
            tensors[re.sub(r"^model\.(language_model\.)?", "", name)] = value.to(torch.float32).numpy()
    single = [match for name in tensors if (match := _EXPERT.fullmatch(name))]
    for prefix in sorted({match[1] for match in single}):
        parts: dict[str, list[Array]] = {"gate": [], "up": [], "down": []}
        for expert in range(sum(match[1] == prefix for match in single) // 3):
            for part, found in parts.items():
                found.append(tensors.pop(f"{prefix}{expert}.{part}_proj.weight"))
        tensors[f"{prefix}gate_up_proj"] = np.concatenate([np.stack(parts["gate"]), np.stack(parts["up"])], axis=1)
        tensors[f"{prefix}down_proj"] = np.stack(parts["down"])
    return tensors


def folded_tensors(
    config: dict[str, Any], tensors: dict[str, Array], *, tiled: bool = True, grouped: bool = False
) -> Iterator[tuple[str, Array]]:
    """The tensors of the file, in fp32. `grouped`: in_proj_qkvz of Qwen3-Next as it is, as older files have it."""
    Hk, Hv, Dk, Dv = (config[f"linear_{key}"] for key in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim"))

    def turned(rows: Array, size: int) -> Array:
        """Value heads of a key head, next to each other, become heads that are Hk apart."""
        if not tiled:
            return rows
        return np.ascontiguousarray(rows.reshape(Hk, Hv // Hk, size, *rows.shape[1:]).swapaxes(0, 1)).reshape(rows.shape)

    for name, value in tensors.items():
        if name in _OUTSIDE:
            yield _OUTSIDE[name], value + 1 if "norm" in name else value
            continue
        if name.startswith("mtp.") and not name.startswith("mtp.layers."):
            yield f"blk.{config['num_hidden_layers']}.{_DRAFT[name[4:]]}", value + 1 if "norm" in name else value
            continue
        place = re.fullmatch(r"(mtp\.)?layers\.(\d+)\.(.*)", name)
        assert place is not None, name
        number, rest = int(place[2]) + (config["num_hidden_layers"] if place[1] else 0), place[3]
        if rest.endswith("norm.weight") and rest != "linear_attn.norm.weight":
            value = value + 1
        elif rest == "linear_attn.A_log":
            value = turned(-np.exp(value), 1)
        elif rest in ("linear_attn.dt_bias", "linear_attn.in_proj_a.weight", "linear_attn.in_proj_b.weight"):
            value = turned(value, 1)
        elif rest == "linear_attn.in_proj_z.weight":
            value = turned(value, Dv)
        elif rest in ("linear_attn.in_proj_qkv.weight", "linear_attn.conv1d.weight"):
            value = np.concatenate([value[: 2 * Hk * Dk], turned(value[2 * Hk * Dk :], Dv)])
            value = value.squeeze(1) if "conv1d" in rest else value
        elif rest == "linear_attn.out_proj.weight":
            value = np.ascontiguousarray(turned(np.ascontiguousarray(value.T), Dv).T)
        elif rest == "mlp.shared_expert_gate.weight":
            value = value.squeeze(0)
        elif rest == "linear_attn.in_proj_qkvz.weight" and grouped:
            yield f"blk.{number}.ssm_in.weight", value
            continue
        elif rest == "linear_attn.in_proj_qkvz.weight":
            ratio = Hv // Hk
            q, k, v, z = np.split(value.reshape(Hk, -1, value.shape[-1]), np.cumsum([Dk, Dk, ratio * Dv]), axis=1)
            flat = [part.reshape(-1, value.shape[-1]) for part in (q, k, v)]
            yield f"blk.{number}.attn_qkv.weight", np.concatenate(flat)
            yield f"blk.{number}.attn_gate.weight", np.ascontiguousarray(z.reshape(-1, value.shape[-1]))
            continue
        elif rest == "mlp.experts.gate_up_proj":
            half = value.shape[1] // 2
            yield f"blk.{number}.ffn_gate_exps.weight", np.ascontiguousarray(value[:, :half])
            yield f"blk.{number}.ffn_up_exps.weight", np.ascontiguousarray(value[:, half:])
            continue
        yield f"blk.{number}.{_LAYER[rest]}", value


def write_metadata(writer: gguf.GGUFWriter, source: Path, config: dict[str, Any], rows: int) -> None:
    """The keys that llama.cpp's converter writes for the family."""
    drafts = config.get("mtp_num_hidden_layers", 0)
    writer.add_block_count(config["num_hidden_layers"] + drafts)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope.get("partial_rotary_factor", 0.25)))
    writer.add_rope_dimension_sections([*rope.get("mrope_section", [11, 11, 10]), 0])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
    writer.add_uint32(f"{writer.arch}.full_attention_interval", config.get("full_attention_interval", 4))
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    else:
        writer.add_feed_forward_length(config["intermediate_size"])
    if drafts:
        writer.add_uint32(f"{writer.arch}.nextn_predict_layers", drafts)
    if (source / "tokenizer.json").exists():
        write_tokenizer(writer, source, rows)


def write_tokenizer(writer: gguf.GGUFWriter, source: Path, rows: int) -> None:
    stored = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [gguf.TokenType.UNUSED] * rows
    for token, number in stored["model"]["vocab"].items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    ids = {}
    for token in stored["added_tokens"]:
        number, text = token["id"], token["content"]
        special = token["special"] or (text.startswith("<|") and text.endswith("|>"))
        tokens[number], kinds[number] = text, gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        ids[text] = number
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for key, add in (("eos_token", writer.add_eos_token_id), ("pad_token", writer.add_pad_token_id)):
        if settings.get(key) in ids:
            add(ids[settings[key]])
    if (source / "chat_template.jinja").exists():
        writer.add_chat_template((source / "chat_template.jinja").read_text(encoding="utf-8"))


def write_gguf(
    source: Path,
    file: Path,
    kind: KindOf,
    *,
    architecture: str = "qwen35",
    parts: int = 0,
    extra: dict[str, int | float | str | bool] | None = None,
    skip: Callable[[str], bool] = lambda name: False,
    rename: Mapping[str, str] = {},
    change: Mapping[str, Callable[[Array], Array]] = {},
    grouped: bool = False,
    stored: dict[str, Array] | None = None,
    encode: Callable[[Array, Kind], Array] = gguf.quants.quantize,
) -> dict[str, Array]:
    """Write `file`, or with `parts` that many as llama.cpp names them; returns the tensors as they are encoded. `extra`: more keys, under
    the name of the architecture; `skip`: tensors that are left out;
    `rename` and `change`: other names and values for some; `stored`: these instead of all that `checkpoint_tensors` finds."""
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = raw.get("text_config", raw)
    folded = folded_tensors(config, stored or checkpoint_tensors(source), tiled=architecture != "qwen3next", grouped=grouped)
    tensors = {rename.get(name, name): change.get(name, np.asarray)(value) for name, value in folded if not skip(name)}
    encoded = {}
    per_file = -(-len(tensors) // parts) if parts else 0
    writer = gguf.GGUFWriter(file, architecture, split_max_tensors=per_file)
    write_metadata(writer, source, config, len(tensors["token_embd.weight"]))
    for key, value in (extra or {}).items():
        name = f"{architecture}.{key}"
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}[type(value)]
        add(name, value)
    for name, value in tensors.items():
        chosen = kind(name, value.shape)
        encoded[name] = encode(value, chosen)
        writer.add_tensor(name, encoded[name], raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return encoded


def written(source: Path, file: Path, kind: Kind, **options: Any) -> Path:
    """One of the demo checkpoints, with matrices of one kind."""
    write_gguf(source, file, matrices(kind), architecture=ARCHITECTURES[source], **options)
    return file
