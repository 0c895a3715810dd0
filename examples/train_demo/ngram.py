"""The baseline: an interpolated Kneser-Ney 5-gram model over the same tokens and the same split.

    python ngram.py --tokens build/tokens --out build/ngram.json

p_n(w | c) = max(count(c w) - D, 0) / count(c) + D * types(c) / count(c) * p_{n-1}(w | c shortened by its oldest token), where orders below
the highest count distinct left neighbors instead of occurrences, D = n1 / (n1 + 2 n2) per order, and the last resort is uniform.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VOCAB = np.uint64(8192)
ORDER = 5


@dataclass(frozen=True)
class Level:
    """Sorted n-gram keys of one order with their counts, and for each context (a prefix) its total and number of types."""

    keys: np.ndarray
    counts: np.ndarray
    context_keys: np.ndarray
    context_totals: np.ndarray
    context_types: np.ndarray
    discount: float

    def probability(self, context: np.ndarray, key: np.ndarray, lower: np.ndarray) -> np.ndarray:
        count, _ = lookup(self.keys, self.counts, key)
        total, at = lookup(self.context_keys, self.context_totals, context)
        types = np.where(total > 0, self.context_types[at], 0)
        safe = np.maximum(total, 1)
        mixed = np.maximum(count - self.discount, 0) / safe + self.discount * types / safe * lower
        return np.where(total > 0, mixed, lower)


def lookup(keys: np.ndarray, values: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.minimum(np.searchsorted(keys, query), len(keys) - 1)
    return np.where(keys[at] == query, values[at], 0), at


def pack(ids: np.ndarray, order: int) -> np.ndarray:
    """One uint64 per position for the `order` tokens that start there, 13 bits each; order is at most 4."""
    length = len(ids) - order + 1
    key = np.zeros(length, np.uint64)
    for i in range(order):
        key = key * VOCAB + ids[i : i + length].astype(np.uint64)
    return key


def make_level(keys: np.ndarray, counts: np.ndarray) -> Level:
    """keys: sorted unique context * VOCAB + token."""
    contexts = keys // VOCAB
    starts = np.flatnonzero(np.concatenate(([True], contexts[1:] != contexts[:-1])))
    totals = np.add.reduceat(counts, starts)
    types = np.diff(np.concatenate((starts, [len(keys)])))
    ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
    discount = ones / (ones + 2 * twos) if ones else 0.5
    return Level(keys, counts, contexts[starts], totals, types, discount)


class KneserNey:
    def __init__(self, ids: np.ndarray) -> None:
        self.fours = np.unique(pack(ids[:-1], ORDER - 1))  # the contexts of 5-grams; 65 bits do not fit, so they are numbered
        numbered = np.searchsorted(self.fours, pack(ids[:-1], ORDER - 1)).astype(np.uint64)
        keys, counts = np.unique(numbered * VOCAB + ids[ORDER - 1 :].astype(np.uint64), return_counts=True)
        self.levels = {ORDER: make_level(keys, counts)}
        suffix = self.fours[keys // VOCAB] % VOCAB ** np.uint64(3) * VOCAB + keys % VOCAB
        for order in range(ORDER - 1, 0, -1):
            keys, counts = np.unique(suffix, return_counts=True)
            self.levels[order] = make_level(keys, counts)
            suffix = keys % VOCAB ** np.uint64(order - 1)

    def probability(self, ids: np.ndarray) -> np.ndarray:
        """p(token | four tokens before it) for every token of ids from the fifth on."""
        n = len(ids) - ORDER + 1
        p = np.full(n, 1.0 / float(VOCAB))
        token = ids[ORDER - 1 :].astype(np.uint64)
        for order in range(1, ORDER + 1):
            context = pack(ids[ORDER - order : -1], order - 1)[:n] if order > 1 else np.zeros(n, np.uint64)
            if order == ORDER:
                at = np.minimum(np.searchsorted(self.fours, context), len(self.fours) - 1)
                context = np.where(self.fours[at] == context, at.astype(np.uint64), np.uint64(2**50))
            p = self.levels[order].probability(context, context * VOCAB + token, p)
        return p


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, default=Path("build/tokens"))
    parser.add_argument("--out", type=Path, default=Path("build/ngram.json"))
    args = parser.parse_args()
    sizes = json.loads((args.tokens / "sizes.json").read_text())
    # One model over all streams, like the networks; the separator keeps documents of different streams apart.
    model = KneserNey(np.concatenate([np.load(args.tokens / f"{name}.train.npy") for name in ("code", "docs", "chat")]))
    results = {}
    for name in ("code", "docs", "chat"):
        ids = np.load(args.tokens / f"{name}.heldout.npy")
        loss = float(-np.log(model.probability(ids)).mean())
        bits = loss * len(ids) / math.log(2) / sizes[f"{name}.heldout"]["bytes"]
        results[name] = {"nats_per_token": loss, "bits_per_byte": bits}
        print(f"5-gram {name}: {loss:.4f} nats/token, {bits:.4f} bits/byte")
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
