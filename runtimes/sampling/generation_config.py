"""generation_config.json: every key that transformers knows, and what is done with it here.

`KEYS` is the table. A key is used; or it has no influence on the tokens here, whatever its value; or it would have an influence that is not
implemented, and then only values that switch it off are taken and all others are refused when a bundle is built. Keys that transformers
does not know either have no influence there; they are listed as a note.

Values are read as other tools write them: integers as 50.0, numbers as "0.7", and the value for "off" of each key below, null included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from qwen_export.errors import ParameterError, QwenExportError
from qwen_export.runtimes.sampling.sampler import SamplingParams


class Use(Enum):
    USED = "used"
    NO_INFLUENCE = "no influence on the tokens"
    REFUSED = "refused unless off"


@dataclass(frozen=True)
class Key:
    """`off`: values, besides null, that mean the same as no value. `why`: what the key is, or why it does not matter."""

    use: Use
    off: tuple[Any, ...] = ()
    why: str = ""


def _used(*off: Any, why: str = "") -> Key:
    return Key(Use.USED, off, why)


def _no_influence(why: str) -> Key:
    return Key(Use.NO_INFLUENCE, (), why)


def _refused(*off: Any, why: str = "") -> Key:
    return Key(Use.REFUSED, off, why)


_BEAMS = "beam search, which there is not"
_OUTPUT = "what transformers returns beside the tokens"
_CACHE = "how transformers keeps its cache"
_DRAFTS = "how transformers drafts; bundles draft their own way, and drafts do not change the tokens"
_IDS = "not needed: no token is put in front of or behind a prompt"

KEYS: Mapping[str, Key] = {
    # sampling
    "do_sample": _used(why="false is greedy; absent or true samples"),
    "temperature": _used(why="0 is greedy"),
    "top_k": _used(0, -1, why="50 where the file sets temperature or top_p alone, as in transformers"),
    "top_p": _used(why="0 keeps the likeliest token alone"),
    "min_p": _used(0, -1),
    "repetition_penalty": _used(1),
    "presence_penalty": _used(0, why="not of transformers; OpenAI's and vLLM's meaning"),
    "frequency_penalty": _used(0, why="not of transformers; OpenAI's and vLLM's meaning"),
    "no_repeat_ngram_size": _used(0, -1),
    "bad_words_ids": _used([]),
    "suppress_tokens": _used([]),
    "begin_suppress_tokens": _used([]),
    "top_h": _refused(why="top-H sampling"),
    "typical_p": _refused(1, why="typical sampling"),
    "epsilon_cutoff": _refused(0, why="epsilon sampling"),
    "eta_cutoff": _refused(0, why="eta sampling"),
    "encoder_repetition_penalty": _refused(1, why="a penalty for tokens that the prompt lacks"),
    "encoder_no_repeat_ngram_size": _refused(0, -1, why="sequences of the prompt that may not come"),
    "exponential_decay_length_penalty": _refused(why="a penalty that grows with the length"),
    "sequence_bias": _refused([], {}, why="added to the logits of sequences"),
    "guidance_scale": _refused(1, why="classifier-free guidance"),
    "watermarking_config": _refused(why="watermarks"),
    "penalty_alpha": _refused(0, why="contrastive search"),
    "dola_layers": _refused(why="DoLa decoding"),
    "forced_bos_token_id": _refused(-1, why="a forced first token"),
    "forced_eos_token_id": _refused(-1, why="a forced last token"),
    "token_healing": _refused(False, why="other tokens at the end of the prompt"),
    "renormalize_logits": _no_influence("probabilities are normalized in any case"),
    "remove_invalid_values": _no_influence("logits that are no numbers are an error"),
    # length and end
    "max_new_tokens": _used(-1, why="where the caller gives no {max_new_tokens}"),
    "max_length": _used(-1, why="prompt and answer together, where there is no max_new_tokens"),
    "min_new_tokens": _used(0, -1),
    "stop_strings": _used([], "", why="where the caller gives no {stop}; they are not part of the answer"),
    "eos_token_id": _used([], -1),
    "min_length": _refused(0, -1, why="a least length with the prompt; min_new_tokens is read"),
    "max_time": _refused(-1, why="a limit of time"),
    "pad_token_id": _no_influence(_IDS),
    "bos_token_id": _no_influence(_IDS),
    "decoder_start_token_id": _no_influence("for models with an encoder"),
    # beams
    "num_beams": _refused(0, 1, why=_BEAMS),
    "num_beam_groups": _refused(0, 1, why=_BEAMS),
    "num_return_sequences": _refused(0, 1, why="several answers to one prompt"),
    "constraints": _refused([], why=_BEAMS),
    "force_words_ids": _refused([], why=_BEAMS),
    "early_stopping": _no_influence("of beam search alone"),
    "length_penalty": _no_influence("of beam search alone"),
    "diversity_penalty": _no_influence("of beam search alone"),
    # the rest
    **dict.fromkeys(("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory"), _no_influence(_CACHE)),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"), _no_influence(_OUTPUT)
    ),
    **dict.fromkeys(
        (
            "use_mtp",
            "is_assistant",
            "num_assistant_tokens",
            "num_assistant_tokens_schedule",
            "assistant_confidence_threshold",
            "prompt_lookup_num_tokens",
            "max_matching_ngram_size",
            "assistant_early_exit",
            "assistant_lookbehind",
            "target_lookbehind",
            "speculation_type",
        ),
        _no_influence(_DRAFTS),
    ),
    "assistant_ensemble_weight": _refused(why="a mixture of the model and its drafts"),
    "compile_config": _no_influence("how transformers compiles"),
    "disable_compile": _no_influence("how transformers compiles"),
    "prefill_chunk_size": _no_influence("how transformers reads a prompt"),
    "continuous_batching_config": _no_influence("how transformers batches"),
    "transformers_version": _no_influence("who wrote the file"),
    "_from_model_config": _no_influence("who wrote the file"),
    "_commit_hash": _no_influence("who wrote the file"),
}

# What transformers takes for these where a file sets others of them.
_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}


@dataclass(frozen=True)
class GenerationDefaults:
    """What a file sets. `choice`: temperature, top_p and top_k, if it sets any of them; `others`: further fields of `SamplingParams`."""

    greedy: bool = False
    choice: Mapping[str, Any] | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    max_length: int | None = None
    stop_strings: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    unknown: tuple[str, ...] = ()
    """Keys that transformers does not know."""

    def new_tokens(self, prompt_tokens: int, wanted: int | None) -> int | None:
        """The limit of an answer: what the caller wants, else what the file sets, else none."""
        if wanted is not None:
            if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
                raise ParameterError(
                    "the number of new tokens is out of range",
                    parameter="max_new_tokens",
                    got=repr(wanted),
                    expected="an integer >= 1",
                    fix="Give at least 1, or leave {max_new_tokens} out.",
                )
            return wanted
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens
        if prompt_tokens >= self.max_length:
            raise ParameterError(
                "the prompt is as long as prompt and answer may be by the checkpoint's generation_config.json",
                parameter="max_new_tokens",
                got=f"{prompt_tokens} prompt tokens",
                expected=f"fewer than max_length {self.max_length}",
                fix="Give {max_new_tokens}, which replaces max_length.",
            )
        return self.max_length - prompt_tokens


def read_generation_config(
    config: Mapping[str, Any], error: type[QwenExportError] = QwenExportError, where: str = "generation_config.json"
) -> GenerationDefaults:
    """Read the file's values. Raises `error` for one that is not usable, or that would need what is not implemented."""
    given = {name: value for name, value in config.items() if not _is_off(name, value)}

    def refuse(name: str, expected: object, fix: str = "Correct the value in the checkpoint's file, or remove the key.") -> QwenExportError:
        return error(
            "a generation setting of the checkpoint is not usable",
            where=f"{where}, {name}",
            got=repr(config[name]),
            expected=expected,
            fix=fix,
        )

    def read(name: str, convert: Callable[[Any], Any], expected: str) -> Any:
        if name not in given:
            return None
        try:
            return convert(given[name])
        except (TypeError, ValueError, OverflowError) as failure:
            raise refuse(name, expected) from failure

    for name in given:
        key = KEYS.get(name)
        if key is not None and key.use is Use.REFUSED:
            off = " or ".join(map(repr, key.off)) or "null"
            raise refuse(name, f"{off}, since this is not implemented ({key.why})", "Remove the key from the checkpoint's file.")
    numbers: dict[str, Any] = {name: read(name, _number, "a number") for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
    numbers |= {name: read(name, _number, "a number") for name in ("presence_penalty", "frequency_penalty")}
    numbers |= {name: read(name, _integer, "an integer") for name in ("top_k", "no_repeat_ngram_size", "min_new_tokens")}
    numbers |= {name: read(name, _ids, "a list of token ids") for name in ("suppress_tokens", "begin_suppress_tokens")}
    numbers["bad_words_ids"] = read("bad_words_ids", _words, "a list of lists of token ids")
    if numbers["top_p"] == 0:
        numbers["top_p"] = 1e-12
    chosen: dict[str, Any] = {name: numbers.pop(name) for name in _DEFAULTS}
    choice: dict[str, Any] | None = None
    if any(config.get(name) is not None for name in chosen):
        # A key that is off is off; one that is not there has transformers' default.
        absent = {name: 0 if name == "top_k" and name in config else default for name, default in _DEFAULTS.items()}
        choice = {name: absent[name] if value is None else value for name, value in chosen.items()}
    others = {name: value for name, value in numbers.items() if value is not None}
    try:
        SamplingParams(**(choice or {}), **others)
    except ParameterError as failure:
        name = failure.parameter
        raise refuse(name, failure.expected) from failure
    limits = {name: read(name, _integer, "an integer") for name in ("max_new_tokens", "max_length")}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise refuse(name, "an integer >= 1")
    return GenerationDefaults(
        greedy=read("do_sample", _switch, "true or false") is False,
        choice=choice,
        others=others,
        stop_strings=read("stop_strings", _texts, "a list of texts") or (),
        stop_ids=read("eos_token_id", _ids, "a token id or a list of token ids") or (),
        unknown=tuple(sorted(name for name in given if name not in KEYS)),
        **limits,
    )


def _is_off(name: str, value: Any) -> bool:
    if value is None:
        return True
    off = KEYS[name].off if name in KEYS else ()
    if isinstance(value, str) and value not in off:
        try:
            value = _number(value)
        except ValueError:
            return False
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in off)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    number = float(value) if isinstance(value, str) else value
    if not math.isfinite(number):
        raise ValueError
    return number


def _integer(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _switch(value: Any) -> bool:
    text = value.lower() if isinstance(value, str) else value
    if text in ("true", "false"):
        return text == "true"
    if text not in (0, 1):
        raise ValueError
    return bool(text)


def _ids(value: Any) -> tuple[int, ...]:
    ids = tuple(_integer(i) for i in (value if isinstance(value, list) else [value]))
    if any(i < 0 for i in ids):
        raise ValueError
    return ids


def _words(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list) or not all(isinstance(word, list) and word for word in value):
        raise TypeError
    return tuple(map(_ids, value))


def _texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) and text for text in texts):
        raise TypeError
    return texts
