"""What a decoder reads: one `Read` per sequence and call of `Decoder.run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen_export.errors import ParameterError
from qwen_export.runtimes.decoding.rotary_tables import Positions
from qwen_export.runtimes.decoding.sequence import Media


@dataclass(frozen=True, slots=True)
class Read:
    """Tokens for the sequence in `slot`, after what it has read.

    `ids`: T token ids. `features` [K,H]: what stands for the tokens at `places`, K positions in `ids`, instead of their embeddings, in the
    type that the bundle's tower makes. `media` are the pictures that the read completes, with positions in the sequence. With `commit` the
    tokens enter the state; without, `Decoder.accept` decides how many of them stay, and T is at most `Decoder.widest_verify`. `logits`:
    how many of the last tokens leave a row of logits, 0 to T.
    `positions` [T] or [T,3]: rotary positions, where they are not those of the tokens in the sequence.
    """

    slot: int
    ids: Sequence[int]
    commit: bool = True
    logits: int = 1
    features: npt.NDArray[np.generic] | None = None
    places: Sequence[int] = ()
    media: tuple[Media, ...] = ()
    positions: Sequence[int] | Positions | None = None

    def parts(self, size: int, begin: int) -> list[Read]:
        """The same as reads of at most `size` tokens one after the other, in a sequence of `begin` tokens; the last has the logits."""
        made, T = [], len(self.ids)
        for start in range(0, T, size):
            stop = min(T, start + size)
            chosen = [i for i, place in enumerate(self.places) if start <= place < stop]
            made.append(
                Read(
                    self.slot,
                    self.ids[start:stop],
                    self.commit,
                    self.logits if stop == T else 0,
                    self.features[chosen] if self.features is not None and chosen else None,
                    [self.places[i] - start for i in chosen],
                    tuple(one for one in self.media if begin + start < one.start + one.count <= begin + stop),
                    None if self.positions is None else self.positions[start:stop],
                )
            )
        return made

    def check(self, slots: int, vocabulary: int) -> None:
        """Raises ParameterError for a read that no decoder of so many slots and token ids could do."""
        T = len(self.ids)
        if not 0 <= self.slot < slots:
            raise ParameterError(
                "the decoder has no such slot",
                parameter="slot",
                got=self.slot,
                expected=f"0 to {slots - 1}",
                fix="Make the decoder with a larger {batch}.",
            )
        if not T:
            raise ParameterError("there is nothing to read", parameter="ids", got="no tokens", fix="Give at least one token.")
        if not 0 <= self.logits <= T:
            raise ParameterError(
                "a read has more rows of logits than tokens",
                parameter="logits",
                got=self.logits,
                expected=f"0 to {T}",
                fix="Ask for a row per token at most.",
            )
        if min(self.ids) < 0 or max(self.ids) >= vocabulary:
            wrong = next(token for token in self.ids if not 0 <= token < vocabulary)
            raise ParameterError(
                "a token id is not in the vocabulary",
                parameter="ids",
                got=wrong,
                expected=f"0 to {vocabulary - 1}",
                fix="Encode the text with the tokenizer of the bundle.",
            )
        count = 0 if self.features is None else len(self.features)
        if count != len(self.places) or any(not 0 <= place < T for place in self.places):
            raise ParameterError(
                "there is not one feature per place in the read",
                parameter="places",
                got=f"{count} features, {len(self.places)} places",
                expected=f"one each, within {T} tokens",
                fix="Give the rows that the tower made for these tokens.",
            )
        if self.positions is not None and len(self.positions) != T:
            raise ParameterError(
                "there is not one position per token", parameter="positions", got=len(self.positions), expected=T, fix="Give one per token."
            )
