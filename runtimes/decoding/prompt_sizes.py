"""Prompts of every size once, before there is a request. On a GPU the first prompt of all loads kernels for 0.1 s, and the first long one
gets the memory of its activations, which a request would wait for. A length that is new after them still takes 10 to 20 ms longer than
the next time (docs/performance.md)."""

from __future__ import annotations

import time

from qwen_export.runtimes.decoding.decoder import Decoder

_SHORTEST = 16
"""Tokens; shorter calls take kernels that steps and verifies have loaded."""
_MOST_S = 1.0
"""Where prompts take longer, what the first one adds matters less: a large model, or experts in host memory."""


def read_every_size(decoder: Decoder) -> None:
    """Read and forget prompts of as many tokens as a call may have, of half as many, and so on. Nothing where first calls are like all
    others. The sequences stay what they are, also where one has been read."""
    if not decoder.records:
        return
    # Caches that grow for all slots together would double for the longest.
    longest = decoder.chunk if decoder.free_bytes is not None else decoder.chunk // 2
    room = decoder.capacity - decoder.lengths[0] - decoder.widest_verify
    mark, unread, began = decoder.mark(on_device=True), decoder.lengths[0] == 0, time.perf_counter()
    while longest >= _SHORTEST and time.perf_counter() - began < _MOST_S:
        if longest <= room:
            decoder.prefill((0,) * longest)
            decoder.rewind(mark)
        longest //= 2
    if unread:
        decoder.release()  # the memory of the longest prompt's cache rows, which no sequence has read
