"""Seeded changes of the files of a checkpoint: of JSON fields, of bytes, of a safetensors header, of a template."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.support.manifest_mutations import damaged, mutated
from tests.support.safetensors_files import split_file

# Kinds of cases: the file that each one changes.
FILES = {
    "config": "config.json",
    "index": "model.safetensors.index.json",
    "header": "model.safetensors-00001-of-00002.safetensors",
    "tokenizer": "tokenizer.json",
    "tokenizer_config": "tokenizer_config.json",
    "template": "chat_template.jinja",
    "generation_config": "generation_config.json",
}

# Keys that fine-tuning tools write, with values of the right type and of others.
_CONFIG_KEYS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("tie_word_embeddings", (True, False, None, "true")),
    ("use_sliding_window", (True, False, None)),
    ("sliding_window", (None, 4096, 8)),
    ("attention_bias", (True, False)),
    ("hidden_act", ("silu", "gelu", "swish", None)),
    ("rope_scaling", (None, {"rope_type": "yarn", "factor": 2.0}, {"type": "linear", "factor": 2}, {"rope_type": "default"}, [])),
    ("rope_theta", (10_000, 1e7, 0, -1, "10000", None)),
    ("partial_rotary_factor", (0.25, 0.5, 1.0, 0, 2)),
    ("final_logit_softcapping", (None, 30.0)),
    ("logit_scale", (1.0, 0.5)),
    ("embedding_multiplier", (1.0, 12.0)),
    ("layer_types", (None, [], ["full_attention"] * 4, ["linear_attention"] * 4, ["sliding_attention"] * 4)),
    ("full_attention_interval", (1, 2, 4, 0, None)),
    ("num_hidden_layers", (0, 1, 3, 5, 10**10)),
    ("rms_norm_eps", (0, 1e-6, 1e-5, 1.0, -1, None)),
    ("attn_output_gate", (True, False, None)),
    ("output_gate_type", ("swish", "sigmoid", None)),
    ("mtp_num_hidden_layers", (0, 1, 2, None)),
    ("num_experts", (0, 4, None)),
    ("head_dim", (8, 16, 32, None)),
    ("quantization_config", (None, {}, {"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4, "group_size": 32})),
    ("torch_dtype", ("bfloat16", "float32", "auto", None)),
    ("architectures", (None, [], ["Qwen3_5ForCausalLM"], ["LlamaForCausalLM"])),
    ("model_type", ("qwen3_5", "qwen3_5_text", "qwen3", None)),
)

_TEMPLATE_PARTS = (
    "{% for a in range(10**9) %}{% for b in range(10**9) %}x{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.join(['x'] * 10**10) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% include 'other' %}",
    "{% extends 'other' %}",
    "{% import 'os' as os %}",
    "{{ nothing.at.all }}",
    "{{ raise_exception('no') }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ 'x' | center(10**10) }}",
    "{% set ns = namespace(x=[0]) %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{{ messages[0].content.format(x=1) }}",
    "{{ strftime_now('%Y') }}",
    "{% generation %}x{% endgeneration %}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ range(10**12) | list }}",
    "{% break %}",
    "\ud7ff\ufeff",
    "{{",
    "{#",
)


def changed(kind: str, checkpoint: Path, seed: int) -> bytes:
    """The bytes of the file of this kind, changed."""
    path, rng = checkpoint / FILES[kind], random.Random(seed)
    raw = path.read_bytes() if path.exists() else b"{}"
    if kind == "header":
        return _changed_header(path, rng, seed)
    if kind == "template":
        return _changed_template(raw, rng, seed)
    if rng.random() < 0.25:
        return damaged(raw, seed)
    value = json.loads(raw)
    if kind == "config" and rng.random() < 0.5:
        target = value.get("text_config", value) if rng.random() < 0.7 else value
        for key, values in rng.sample(_CONFIG_KEYS, rng.choice((1, 1, 2))):
            target[key] = rng.choice(values)
        return json.dumps(value).encode()
    return mutated(value, seed)[1]


def _changed_header(path: Path, rng: random.Random, seed: int) -> bytes:
    header, data = split_file(path)
    text = mutated(header, seed)[1] if rng.random() < 0.5 else damaged(json.dumps(header).encode(), seed)
    length = len(text)
    if rng.random() < 0.1:
        length = rng.choice((0, 1, length - 1, length + 1, 1 << 31, (1 << 63) + 1, (1 << 64) - 1))
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))]
    return length.to_bytes(8, "little") + text + data


def _changed_template(raw: bytes, rng: random.Random, seed: int) -> bytes:
    if rng.random() < 0.4:
        return damaged(raw, seed)
    text = raw.decode()
    at = rng.choice([0, len(text), *(i + 2 for i in range(len(text) - 1) if text[i : i + 2] in ("%}", "}}"))])
    return (text[:at] + rng.choice(_TEMPLATE_PARTS) + text[at:]).encode("utf-8", "surrogatepass")
