"""Which keys of config.json are read, and which are known not to change what the model computes. Any other key is an error.

A key that is unknown here may change the arithmetic (`final_logit_softcapping`, `use_sliding_window`). To ignore it could give another
model without a message. An unknown key whose value is null or empty switches nothing on and is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_export.errors import ConfigError
from qwen_export.graphs.config_fields import shown
from qwen_export.graphs.rope_config import KEYS as ROPE_KEYS

DRAFT_LAYERS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
"""Layers of the draft head; the second name is that of other families, which converters write."""

SIZES = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"),
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"),
        *("layer_types", "full_attention_interval", "rms_norm_eps", "max_position_embeddings"),
    }
)

# Keys with one value that is implemented; `config.py` checks it.
_FIXED = frozenset(
    {
        *("hidden_act", "attention_bias", "attn_output_gate", "output_gate_type", "mtp_use_dedicated_embeddings", "mlp_only_layers"),
        *("decoder_sparse_step", "norm_topk_prob", "use_sliding_window"),
    }
)

ARITHMETIC = SIZES | ROPE_KEYS | _FIXED
"""Keys that change what the decoder computes. In a nested configuration they belong into text_config."""

_ELSEWHERE = frozenset(
    {"architectures", "model_type", "text_config", "vision_config", "quantization_config", "tie_word_embeddings", "eos_token_id"}
)

# What transformers writes for every model. The generation defaults are read from generation_config.json only, as transformers 5 does.
_TRANSFORMERS = frozenset(
    {
        *("transformers_version", "dtype", "torch_dtype", "auto_map", "name_or_path", "problem_type", "id2label", "label2id", "num_labels"),
        *("return_dict", "output_hidden_states", "output_attentions", "use_return_dict", "torchscript", "use_cache", "use_bfloat16"),
        *("tf_legacy_loss", "pruned_heads", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "add_cross_attention"),
        *("cross_attention_hidden_size", "tie_encoder_decoder", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix"),
        *("bos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "unk_token_id", "decoder_start_token_id", "initializer_range"),
        *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "classifier_dropout", "attn_implementation"),
        *("experts_implementation", "gradient_checkpointing", "pretraining_tp", "max_window_layers", "sliding_window"),
        *("max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
        *("diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores"),
        *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"),
        *("begin_suppress_tokens", "exponential_decay_length_penalty", "cache_implementation", "cache_config"),
    }
)

# Of the family's releases: training losses, the type of a server's state cache, ids of the vision part.
_FAMILY = frozenset(
    {
        *("output_router_logits", "router_aux_loss_coef", "mamba_ssm_dtype", "language_model_only", "bos_token", "eos_token"),
        *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "audio_token_id", "vision_token_id"),
        *(
            "image_token_index",
            "video_token_index",
            "pad_token",
            "mtp_loss_weight",
            "mtp_loss_scaling_factor",
            "use_mrope",
            "router_jitter_noise",
        ),
    }
)

# Notes of tools about themselves.
_TOOLS = frozenset({"unsloth_version", "unsloth_fixed", "model_name", "peft_version"})

_IGNORED = _TRANSFORMERS | _FAMILY | _TOOLS
_KNOWN = ARITHMETIC | _ELSEWHERE | frozenset(DRAFT_LAYERS) | _IGNORED


def check_keys(raw: Mapping[str, Any], text: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for a key that may change the model and is not implemented, and for one at the wrong level. `text` is the text
    configuration, which may be `raw` itself."""
    unknown = [key for level in ((raw,) if text is raw else (raw, text)) for key, value in level.items() if _unknown(key, value)]
    if unknown:
        raise ConfigError(
            "config.json has keys that may change the model and are not implemented",
            where=where,
            got=", ".join(shown(key) for key in unknown[:8]),
            expected="the keys of the Qwen3.5 / Qwen3.6 / Qwen3-Next releases",
            fix="Remove a key that does not change what the model computes. A model that needs it is not supported.",
        )
    if text is raw:
        return
    for key in sorted(ARITHMETIC & raw.keys()):
        if raw[key] is None or (key in text and text[key] == raw[key]):
            continue
        raise ConfigError(
            f"config.json has {key!r} beside text_config"
            + (", with another value than in it" if key in text else ", where nothing reads it"),
            where=where,
            got=shown(raw[key]),
            expected=shown(text[key]) if key in text else f"{key!r} inside text_config",
            fix="Keep the key in text_config only, with the value that the model was trained with.",
        )


def _unknown(key: str, value: Any) -> bool:
    empty = value is None or (isinstance(value, (list, dict, str)) and not value)
    return key not in _KNOWN and not key.startswith("_") and not empty
