"""Prompts of every size once, before there is a request. On a GPU the first prompt of all loads kernels for 0.1 s, and the first long one
gets the memory of its activations, which a request would wait for. Products of many rows have a kernel for each class of sizes
(plugins/native/cublas_lt.h), and the draft head records its calls for prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator

from qwen_export.runtimes.decoding.decoder import Decoder

_SHORTEST = 16
"""Tokens; shorter calls take kernels that steps and verifies have loaded."""
_FROM_NINE_EIGHTHS = 128
"""Tokens from which on a few more than a power of two are a class of their own."""
_MOST_S = 1.5
"""Where prompts take longer, what the first one adds matters less: a large model, or experts in host memory."""


def prompt_classes(longest: int) -> Iterator[int]:
    """Lengths each of which stands for those between it and the next shorter one: `longest`, 3/4 and 9/16 of it, half of it, and so on."""
    while longest >= _SHORTEST:
        yield longest
        if longest // 4 * 3 > _SHORTEST:
            yield longest // 4 * 3
        if longest // 2 >= _FROM_NINE_EIGHTHS:
            yield longest // 16 * 9
        longest //= 2


def read_every_size(decoder: Decoder) -> None:
    """Read and forget prompts of as many tokens as a call may have, and of each class below. Nothing where first calls are like all others.
    The sequences stay what they are, also where one has been read."""
    if not decoder.records:
        return
    # Caches that grow for all slots together would double for the longest.
    longest = decoder.chunk if decoder.free_bytes is not None else decoder.chunk // 2
    room = decoder.capacity - decoder.lengths[0] - decoder.widest_verify
    mark, unread, began, caught_up = decoder.mark(on_device=True), decoder.lengths[0] == 0, time.perf_counter(), False
    for length in prompt_classes(longest):
        if length > room:
            continue
        if time.perf_counter() - began > _MOST_S:
            break
        decoder.prefill((0,) * length)
        if decoder.head is not None and not caught_up:
            decoder.head.catch_up(0)
            caught_up = True
        decoder.rewind(mark)
    if unread:
        decoder.release()  # the memory of the longest prompt's cache rows, which no sequence has read
