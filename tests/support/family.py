"""Configurations of the Qwen3.5 / Qwen3.6 / Qwen3-Next family, as their `config.json` files carry them, and tiny shapes of the same layout.

What differs between the releases is one row per checkpoint in `_RELEASES`; the rest is shared. Where a row's total is known, the
tensor list that `qwen_export.graphs.checkpoint.tensor_table` derives from the configuration adds up to the `metadata.total_size` of the
published `model.safetensors.index.json` to the byte (`PUBLISHED_BYTES`, checked by `tests/test_synthesize.py`). So the widths, the head
counts, the tied heads, the MTP layer and the vision tower below are those of the releases, not guesses. No published total was at hand
for 3.5-35B-A3B: its widths are those of 3.6-35B-A3B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

ENDOFTEXT_ID = 248044
"""`<|endoftext|>`: `text_config.eos_token_id`. The other special ids have fixed distances from it."""

TOKENS_IN_USE = 248077
"""Tokens of the tokenizer; the embedding has `vocab_size` = 248320 rows, the rest is padding."""


@dataclass(frozen=True)
class Vision:
    """Widths of a vision tower; its output width is the hidden size of the decoder."""

    depth: int
    hidden: int
    intermediate: int
    heads: int


@dataclass(frozen=True)
class Experts:
    """Sparse feed-forward: `count` experts of width `intermediate`, `per_token` of them active, and a shared one of width `shared`."""

    count: int
    per_token: int
    intermediate: int
    shared: int


@dataclass(frozen=True)
class Release:
    """The values in which the checkpoints differ. `ffn` is the dense width or the expert set; `generation` is "3.5", "3.6" or "next"."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    value_heads: int
    ffn: int | Experts
    vision: Vision | None
    tied: bool = False
    generation: str = "3.5"
    vocab: int = 248320
    head_dim: int = 256
    key_heads: int = 16
    linear_head_dim: int = 128
    positions: int = 262144
    patch_grid: int = 48
    endoftext: int = ENDOFTEXT_ID


_SMALL, _MEDIUM, _LARGE = Vision(12, 768, 3072, 12), Vision(24, 1024, 4096, 16), Vision(27, 1152, 4304, 16)

_RELEASES = {
    "0.8B": Release(1024, 24, 8, 2, 16, 3584, _SMALL, tied=True),
    "2B": Release(2048, 24, 8, 2, 16, 6144, _MEDIUM, tied=True),
    "4B": Release(2560, 32, 16, 4, 32, 9216, _MEDIUM, tied=True),
    "9B": Release(4096, 32, 16, 4, 32, 12288, _LARGE),
    "27B": Release(5120, 64, 24, 4, 48, 17408, _LARGE),
    "35B-A3B": Release(2048, 40, 16, 2, 32, Experts(256, 8, 512, 512), _LARGE),
    "122B-A10B": Release(3072, 48, 32, 2, 64, Experts(256, 8, 1024, 1024), _LARGE),
    "397B-A17B": Release(4096, 60, 32, 2, 64, Experts(512, 10, 1024, 1024), _LARGE),
}
_RELEASES["next-80B-A3B"] = Release(
    2048, 48, 16, 2, 32, Experts(512, 10, 512, 512), None, generation="next", vocab=151936, endoftext=151643
)
_RELEASES["3.6-27B"] = replace(_RELEASES["27B"], generation="3.6")
_RELEASES["3.6-35B-A3B"] = replace(_RELEASES["35B-A3B"], generation="3.6")

PUBLISHED_BYTES = {
    "0.8B": 1_746_882_752,
    "2B": 4_548_144_832,
    "4B": 9_319_737_856,
    "9B": 19_306_216_416,
    "27B": 55_562_872_800,
    "122B-A10B": 250_173_007_840,
    "397B-A17B": 806_795_875_168,
    "3.6-27B": 55_562_855_904,
    "3.6-35B-A3B": 71_903_645_408,
}
"""`metadata.total_size` of the released bf16 checkpoints, where known."""


def _text_config(release: Release) -> dict[str, Any]:
    frequencies = release.head_dim // 8  # a quarter of the head rotates, in pairs
    section = [(frequencies + 2) // 3, (frequencies + 1) // 3, frequencies // 3]  # time, height, width: 11 + 11 + 10 for 32
    moe = isinstance(release.ffn, Experts)
    config: dict[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": _endoftext(release),
        "full_attention_interval": 4,
        "head_dim": release.head_dim,
        "hidden_act": "silu",
        "hidden_size": release.hidden,
        "initializer_range": 0.02,
        "layer_types": ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(release.layers)],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": release.linear_head_dim,
        "linear_num_key_heads": release.key_heads,
        "linear_num_value_heads": release.value_heads,
        "linear_value_head_dim": release.linear_head_dim,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": release.positions,
        "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": release.heads,
        "num_hidden_layers": release.layers,
        "num_key_value_heads": release.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": section,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": release.tied,
        "use_cache": True,
        "vocab_size": release.vocab,
    }
    if isinstance(release.ffn, Experts):
        config |= {
            "moe_intermediate_size": release.ffn.intermediate,
            "num_experts": release.ffn.count,
            "num_experts_per_tok": release.ffn.per_token,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": release.ffn.shared,
        }
    else:
        config["intermediate_size"] = release.ffn
    if release.generation == "3.5":
        config["mlp_only_layers"] = []
    else:
        config |= {"bos_token_id": _endoftext(release), "partial_rotary_factor": 0.25}
        if not moe:
            config["output_gate_type"] = "swish"
    return config


def _vision_config(release: Release, vision: Vision, model_type: str) -> dict[str, Any]:
    return {
        "deepstack_visual_indexes": [],
        "depth": vision.depth,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vision.hidden,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": vision.intermediate,
        "model_type": model_type,
        "num_heads": vision.heads,
        "num_position_embeddings": release.patch_grid**2,
        "out_hidden_size": release.hidden,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def _endoftext(release: Release) -> int:
    """A vocabulary too small for the real tokenizer keeps the special ids in its last 32 rows, at the same distances."""
    return release.endoftext if release.vocab > release.endoftext + 32 else release.vocab - 32


def _next_config(release: Release) -> dict[str, Any]:
    """The older flat form of Qwen3-Next: rope spread out, layer kinds by interval only, no word of the draft head."""
    config = _text_config(release)
    rope = config.pop("rope_parameters")
    for key in ("layer_types", "attn_output_gate", "mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "dtype"):
        del config[key]
    endoftext = config["eos_token_id"]
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        **config,
        "bos_token_id": endoftext,
        "decoder_sparse_step": 1,
        "eos_token_id": endoftext + 2,
        "intermediate_size": release.hidden * 5 // 2,  # of the dense layers, of which there are none
        "mlp_only_layers": [],
        "model_type": "qwen3_next",
        "norm_topk_prob": True,
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": None,
        "rope_theta": rope["rope_theta"],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.0.dev0",
        "use_sliding_window": False,
    }


def config_of(release: Release) -> dict[str, Any]:
    """`config.json` of a release: `Qwen3_5(Moe)ForConditionalGeneration`, or the flat `ForCausalLM` form where it has no vision tower;
    `Qwen3NextForCausalLM` for generation "next"."""
    if release.generation == "next":
        return _next_config(release)
    stem, model_type = ("Qwen3_5Moe", "qwen3_5_moe") if isinstance(release.ffn, Experts) else ("Qwen3_5", "qwen3_5")
    text = _text_config(release)
    if release.vision is None:
        return {"architectures": [f"{stem}ForCausalLM"], **text}
    endoftext = text["eos_token_id"]
    config: dict[str, Any] = {
        "architectures": [f"{stem}ForConditionalGeneration"],
        "image_token_id": endoftext + 12,
        "model_type": model_type,
        "text_config": text,
        "tie_word_embeddings": release.tied,
        "transformers_version": "4.57.0.dev0" if release.generation == "3.5" else "4.57.1",
        "video_token_id": endoftext + 13,
        "vision_config": _vision_config(release, release.vision, model_type),
        "vision_end_token_id": endoftext + 10,
        "vision_start_token_id": endoftext + 9,
    }
    if "output_gate_type" in text:
        config["language_model_only"] = False
    return config


FAMILY: dict[str, dict[str, Any]] = {name: config_of(release) for name, release in _RELEASES.items()}
"""Size -> `config.json` of the release. Shared objects: copy before changing one."""


def tiny_config(
    *,
    value_ratio: int = 2,
    query_ratio: int = 2,
    moe: bool = False,
    tied: bool = False,
    vision: bool = True,
    layers: int = 4,
    vocab_size: int = 512,
    generation: str = "3.5",
    **overrides: Any,
) -> dict[str, Any]:
    """A configuration of the released form that runs in milliseconds: hidden 64, three linear layers and one full-attention layer.

    `value_ratio` is value heads per key head of the linear layers, `query_ratio` query heads per key/value head; key and key/value heads
    are 2, so that a wrong head mapping shows. `vision=False` gives the flat `ForCausalLM` form, `generation="next"` with `moe=True` the
    form of Qwen3-Next. `overrides` replace values of the text configuration.
    """
    if "num_hidden_layers" in overrides:
        raise ValueError("pass layers=, which also writes layer_types, instead of num_hidden_layers=")
    release = Release(
        hidden=64,
        layers=layers,
        heads=2 * query_ratio,
        kv_heads=2,
        value_heads=2 * value_ratio,
        ffn=Experts(8, 2, 32, 48) if moe else 96,
        vision=Vision(2, 32, 64, 2) if vision and generation != "next" else None,
        tied=tied,
        vocab=vocab_size,
        head_dim=64,
        key_heads=2,
        linear_head_dim=16,
        positions=4096,
        patch_grid=4,
        generation=generation,
    )
    config = config_of(release)
    text = config.get("text_config", config)
    text.update(overrides)
    if release.vision and "tie_word_embeddings" in overrides:
        config["tie_word_embeddings"] = overrides["tie_word_embeddings"]
    if release.vision and "hidden_size" in overrides:
        config["vision_config"]["out_hidden_size"] = overrides["hidden_size"]
    return config
