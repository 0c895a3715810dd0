"""How the memory of an engine is divided: states of all slots, caches of the sequences that run, beginnings of prompts."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from qwen_export.errors import ParameterError
from qwen_export.runtimes.decoding.decoder import Decoder

PREFIX_MEMORY = 1 << 30
"""Bytes for beginnings of prompts, when the caller names none; at most half of what one whole context leaves."""
_OF_FREE = 0.85
"""The share of a GPU's free memory that caches may take, when the caller names no limit: activations need the rest."""


class MemoryPlan(NamedTuple):
    """Bytes. `growing`: for caches of running sequences, beyond what all slots hold from the start. `prefix`: for beginnings of prompts.
    `limit`: all together, without prefixes that are in other memory. `longest`: tokens that one sequence may have."""

    growing: int
    prefix: int
    limit: int
    longest: int


def plan_memory(
    decoder: Decoder, cache_memory: int | None, prefix_memory: int | None, *, prefix_apart: bool, share: float = 1.0
) -> MemoryPlan:
    """`cache_memory`: all that may be used, None for what all slots may need or the device has. `prefix_memory`: the part of it for
    beginnings of prompts; with `prefix_apart` these are in other memory. `share`: of a GPU's free memory, where several engines grow into
    it. Raises ParameterError where no whole context fits."""
    if prefix_memory is not None and prefix_memory < 0:
        raise ParameterError(
            "the memory for prompts is negative",
            parameter="prefix_memory",
            got=prefix_memory,
            expected="at least 0 bytes",
            fix="Raise {prefix_memory}.",
        )
    ahead = max(1, decoder.widest_verify)
    fixed, whole = decoder.fixed_bytes, decoder.growing_bytes(decoder.capacity + ahead)
    if cache_memory is None:
        prefix = PREFIX_MEMORY if prefix_memory is None else prefix_memory
        growing, free = decoder.batch * whole, decoder.free_bytes
        if free is not None:
            growing = min(growing, max(0, int(_OF_FREE * share * free) - (0 if prefix_apart else prefix)))
        lengths = range(decoder.capacity + 1)
        longest = bisect_right(lengths, growing, key=lambda length: decoder.growing_bytes(length + ahead)) - 1
        return MemoryPlan(growing, prefix, fixed + growing + (0 if prefix_apart else prefix), longest)
    spare = cache_memory - fixed - whole
    if spare < 0:
        raise ParameterError(
            "the memory does not hold the states of all slots and one whole context",
            parameter="cache_memory",
            got=f"{cache_memory} bytes",
            expected=f"at least {fixed + whole} bytes for {decoder.batch} slots and {decoder.capacity} tokens",
            fix="Raise {cache_memory}, take fewer {slots}, or lower {max_context}.",
        )
    if prefix_apart:
        return MemoryPlan(whole + spare, PREFIX_MEMORY if prefix_memory is None else prefix_memory, cache_memory, decoder.capacity)
    prefix = min(PREFIX_MEMORY, spare // 2) if prefix_memory is None else prefix_memory
    if prefix > spare:
        raise ParameterError(
            "the memory for beginnings of prompts leaves too little for one whole context",
            parameter="prefix_memory",
            got=f"{prefix} bytes",
            expected=f"at most {spare} bytes of the {cache_memory}",
            fix="Lower {prefix_memory}, or raise {cache_memory}.",
        )
    return MemoryPlan(whole + spare - prefix, prefix, cache_memory, decoder.capacity)
