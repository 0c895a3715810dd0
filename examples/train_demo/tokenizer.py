"""Train the byte-level BPE tokenizer and turn the corpus into token files.

    python tokenizer.py train  --work build/corpus --out build/tokenizer
    python tokenizer.py encode --work build/corpus --out build/tokenizer --tokens build/tokens

`encode` writes one uint16 array per stream and split (`code.train.npy`, ...); documents are separated by <|endoftext|>.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BASE_VOCAB = 8128  # byte alphabet and merges
PADDED_VOCAB = 8192  # rows of the embedding; ids past the special tokens are never produced
TRAIN_BYTES = 45_000_000

# The family's special tokens in id order; True marks those that decoding with skip_special_tokens removes.
SPECIAL_TOKENS: tuple[tuple[str, bool], ...] = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<|object_ref_start|>", True),
    ("<|object_ref_end|>", True),
    ("<|box_start|>", True),
    ("<|box_end|>", True),
    ("<|quad_start|>", True),
    ("<|quad_end|>", True),
    ("<|vision_start|>", True),
    ("<|vision_end|>", True),
    ("<|vision_pad|>", True),
    ("<|image_pad|>", True),
    ("<|video_pad|>", True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<|fim_prefix|>", False),
    ("<|fim_middle|>", False),
    ("<|fim_suffix|>", False),
    ("<|fim_pad|>", False),
    ("<|repo_name|>", False),
    ("<|file_sep|>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
    ("<|audio_start|>", True),
    ("<|audio_end|>", True),
    ("<tts_pad>", True),
    ("<tts_text_bos>", True),
    ("<tts_text_eod>", True),
    ("<tts_text_bos_single>", True),
    ("<|audio_pad|>", True),
)

# Words with at most one leading symbol or blank, single digits, runs of symbols, newlines, then blanks (so that indentation is one piece).
SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""


def read_jsonl(path: Path) -> Iterator[dict[str, str]]:
    with path.open() as handle:
        for line in handle:
            yield json.loads(line)


def train(work: Path, out: Path) -> None:
    """Fit the merges on a sample of the training split, in the proportion code:docs:chat = 7:2:1, and write the tokenizer files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)

    sample: list[str] = []
    for stream, share in (("code", 0.7), ("docs", 0.2), ("chat", 0.1)):
        texts = [row["text"] for row in read_jsonl(work / f"{stream}.train.jsonl")]
        random.Random(0).shuffle(texts)
        size = 0
        for text in texts:
            if size > share * TRAIN_BYTES:
                break
            sample.append(text)
            size += len(text)
    trainer = trainers.BpeTrainer(vocab_size=BASE_VOCAB, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=24)
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name, special in SPECIAL_TOKENS])

    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    template = (Path(__file__).parent / "chat_template.jinja").read_text()
    (out / "chat_template.jinja").write_text(template)
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer, template), indent=2) + "\n")
    print(f"{tokenizer.get_vocab_size()} ids in use, {PADDED_VOCAB} embedding rows")


def tokenizer_config(tokenizer: Tokenizer, template: str) -> dict[str, object]:
    added = {
        str(tokenizer.token_to_id(name)): {
            "content": name, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": special
        }
        for name, special in SPECIAL_TOKENS
    }  # fmt: skip
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "errors": "replace",
        "split_special_tokens": False,
        "chat_template": template,
    }


def encode(work: Path, out: Path, tokens: Path) -> None:
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    separator = tokenizer.token_to_id("<|endoftext|>")
    tokens.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, dict[str, int]] = {}
    for stream in ("code", "docs", "chat"):
        for split in ("train", "heldout"):
            ids: list[np.ndarray] = []
            size = 0
            batch: list[str] = []
            for row in read_jsonl(work / f"{stream}.{split}.jsonl"):
                batch.append(row["text"])
                size += len(row["text"].encode())
                if len(batch) == 500:
                    ids += _encode_batch(tokenizer, batch, separator)
                    batch = []
            ids += _encode_batch(tokenizer, batch, separator)
            array = np.concatenate([np.zeros(0, np.uint16), *ids])
            np.save(tokens / f"{stream}.{split}.npy", array)
            sizes[f"{stream}.{split}"] = {"tokens": len(array), "bytes": size}
            print(f"{stream}.{split}: {len(array) / 1e6:.2f} M tokens, {size / max(len(array), 1):.2f} bytes per token")
    (tokens / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n")


def _encode_batch(tokenizer: Tokenizer, texts: list[str], separator: int) -> list[np.ndarray]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray([*encoding.ids, separator], np.uint16) for encoding in encodings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["train", "encode"])
    parser.add_argument("--work", type=Path, default=Path("build/corpus"))
    parser.add_argument("--out", type=Path, default=Path("build/tokenizer"))
    parser.add_argument("--tokens", type=Path, default=Path("build/tokens"))
    args = parser.parse_args()
    if args.step == "train":
        train(args.work, args.out)
    else:
        encode(args.work, args.out, args.tokens)


if __name__ == "__main__":
    main()
