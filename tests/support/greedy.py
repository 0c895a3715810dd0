"""Greedy text step by step, by whole rows of logits."""

from __future__ import annotations

from qwen_export.runtimes.decoding.decoder import Decoder


def greedy(decoder: Decoder, ids: list[int], count: int) -> list[int]:
    """The next `count` tokens after `ids`."""
    logits, tokens = decoder.prefill(ids), []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = decoder.step([tokens[-1]])[0]
    return tokens


def greedy_steps(decoder: Decoder, token: int, count: int) -> list[int]:
    """The next `count` tokens after one that the decoder has not read, by the largest logits that steps have picked."""
    made = []
    for _ in range(count):
        token = decoder.step([token])[0].argmax()
        made.append(token)
    return made
