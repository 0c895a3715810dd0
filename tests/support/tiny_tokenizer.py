"""A byte-level BPE of the family's form with 512 tokens, trained on the spot in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from tests.support.real_tokenizer import make_tokenizer_script
from tests.support.templates import family_template

VOCAB = 512
# The last 32 rows hold the special tokens, in the order and at the distances of the released vocabulary.
_PLAIN = VOCAB - 32
_CORPUS = Path(__file__).resolve().parents[2] / "LICENSE"


def write_tiny_tokenizer(out: Path) -> Path:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja in `out`, for `tiny_config(vocab_size=512)`."""
    script = make_tokenizer_script()
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(script.WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=_PLAIN, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([_CORPUS.read_text(encoding="utf-8")], trainer)
    assert tokenizer.get_vocab_size() == _PLAIN
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=text not in script.NOT_SPECIAL) for text in script.ADDED_TOKENS[:32]])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(script.TOKENIZER_CONFIG))
    (out / "chat_template.jinja").write_text(family_template("3.5"))
    return out
