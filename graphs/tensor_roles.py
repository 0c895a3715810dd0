"""Names of the decoder graph's inputs and outputs. The bundle's manifest repeats them with shapes and roles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def state_name(layer: int, key: str, *, after: bool = False) -> str:
    """`layers.3.k_cache` before a call, `layers.3.k_cache.next` after it."""
    return f"layers.{layer}.{key}" + (".next" if after else "")


def state_names(keys: Sequence[Iterable[str]], *, after: bool = False) -> list[str]:
    """Names of all states, layer by layer; `keys` has the state keys of each layer."""
    return [state_name(i, key, after=after) for i, layer in enumerate(keys) for key in layer]
