"""The text half of a checkpoint from the metadata of a GGUF file: tokenizer.json, chat template, generation_config.json.

The file has tokens, their kinds and merges. The rest is known of the family: NFC, the pattern that cuts text into words (by the name
`tokenizer.ggml.pre`), bytes as characters. The converter calls more tokens special than the releases do: theirs count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_export.errors import CheckpointError, UnsupportedError
from qwen_export.graphs.checkpoint.llama_cpp.gguf_config import shortest
from qwen_export.graphs.config_fields import shown
from qwen_export.graphs.json_file import AGAIN
from qwen_export.manifest import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    "qwen35": _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES,
    "qwen2": _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES,
}
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
# Tokens that look special to the converter, and are ordinary added tokens in the releases.
_NOT_SPECIAL = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
# The ends of a turn and of a text: each file names one of them, and the model writes both.
_ENDS = ("<|im_end|>", "<|endoftext|>")
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty"}
_TEMPLATE, _OTHERS = "tokenizer.chat_template", "tokenizer.chat_templates"


class GgufText:
    """The text files of one model. `where` is its file, for messages."""

    def __init__(self, metadata: Mapping[str, Any], where: Path) -> None:
        self._metadata, self._where = metadata, where

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: those that the file names, and the family's ends of turn and text."""
        ids = [value for key in _END_KEYS if type(value := self._metadata.get(f"tokenizer.ggml.{key}")) is int]
        tokens = self._list("tokens", str)
        return sorted({*ids, *(tokens.index(end) for end in _ENDS if end in tokens)})

    def vocabulary_reason(self, rows: int) -> str:
        """Why the tokenizer cannot be used with an embedding of `rows` rows, "" where it can."""
        count = len(self._metadata.get("tokenizer.ggml.tokens") or ())
        return f"the GGUF file has {count} tokens, and the embedding has {rows} rows" if count > rows else ""

    def write(self, directory: Path) -> None:
        """Write the files. Raises CheckpointError for lists that do not fit each other, UnsupportedError for another tokenizer."""
        texts = {GENERATION_CONFIG: _json(self._generation())}
        if "tokenizer.ggml.tokens" in self._metadata:
            texts[TOKENIZER] = _json(self._tokenizer())
            texts[TOKENIZER_CONFIG] = _json(self._tokenizer_config())
        template = self._metadata.get(_TEMPLATE)
        if isinstance(template, str):
            texts[CHAT_TEMPLATE] = template
        others = self._metadata.get(_OTHERS)
        for name in others if isinstance(others, list) else ():
            other = self._metadata.get(f"{_TEMPLATE}.{name}")
            if isinstance(other, str) and str(name).isidentifier():
                (directory / "additional_chat_templates").mkdir(exist_ok=True)
                texts[f"additional_chat_templates/{name}.jinja"] = other
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8", newline="")

    def _tokenizer(self) -> dict[str, Any]:
        whole = self._metadata.get("tokenizer.huggingface.json")
        if isinstance(whole, str):
            try:
                return json.loads(whole)
            except (ValueError, RecursionError) as error:
                raise self._damaged("the tokenizer of the GGUF file is not valid JSON", str(error)[:200]) from error
        model, pre = self._metadata.get("tokenizer.ggml.model"), self._metadata.get("tokenizer.ggml.pre")
        if model != "gpt2" or pre not in _PATTERNS:
            raise UnsupportedError(
                "the tokenizer of this GGUF file is not one of the family",
                where=str(self._where),
                got=f"{shown(model)}, {shown(pre)}",
                expected=f"'gpt2' with {' or '.join(map(repr, _PATTERNS))}",
                fix="Give a file that a current llama.cpp converted.",
            )
        tokens, kinds, merges = self._list("tokens", str), self._list("token_type", int), self._list("merges", str)
        if len(kinds) != len(tokens):
            raise self._damaged("the GGUF file has another number of tokens than of their kinds", f"{len(tokens)} and {len(kinds)}")
        pairs = [merge.split(" ") for merge in merges]
        wrong = next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None)
        if wrong is not None:
            raise self._damaged("a merge of the tokenizer is not a pair", shown(wrong))
        added, vocabulary = [], {}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
            if kind in (_CONTROL, _USER_DEFINED):
                special = kind == _CONTROL and token not in _NOT_SPECIAL
                added.append(_ADDED | {"id": number, "content": token, "special": special})
            elif kind != _UNUSED:
                vocabulary[token] = number
        split = {"type": "Split", "pattern": {"Regex": _PATTERNS[str(pre)]}, "behavior": "Isolated", "invert": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, _BYTES | {"use_regex": False}]},
            "post_processor": _BYTES | {"use_regex": False},
            "decoder": _BYTES | {"use_regex": False},
            "model": _BPE | {"vocab": vocabulary, "merges": pairs},
        }

    def _tokenizer_config(self) -> dict[str, Any]:
        tokens = self._list("tokens", str)
        named = {}
        for key in ("bos", "eos", "padding", "unknown"):
            number = self._metadata.get(f"tokenizer.ggml.{key}_token_id")
            if type(number) is int and number < len(tokens):
                named[{"padding": "pad", "unknown": "unk"}.get(key, key) + "_token"] = tokens[number]
        if self._metadata.get("tokenizer.ggml.add_bos_token") is not True:
            named.pop("bos_token", None)
        return {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "clean_up_tokenization_spaces": False} | named

    def _generation(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"eos_token_id": self.stop_ids} if self.stop_ids else {}
        for key, name in _SAMPLING.items():
            value = self._metadata.get(f"general.sampling.{key}")
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                settings[name] = shortest(value) if isinstance(value, float) else value
        return settings

    def _list(self, key: str, kind: type) -> list[Any]:
        values = self._metadata.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise self._damaged(f"the GGUF file has no usable tokenizer.ggml.{key}", type(values).__name__)
        return values

    def _damaged(self, what: str, got: str) -> CheckpointError:
        return CheckpointError(what, where=str(self._where), got=got, fix=AGAIN)


_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
_BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
