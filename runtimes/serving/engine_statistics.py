"""The figures of an engine, to watch and to size it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from qwen_export.runtimes.serving.prefix_cache import PrefixStatistics


@dataclass
class EngineStatistics:
    """`steps` and seconds since the engine began; `host_s` is what steps took beside calls of the backend, which
    last from their starts to their ends, and its bindings."""

    slots: int = 0
    running: int = 0
    waiting: int = 0
    steps: int = 0
    rows: int = 0
    """Rows of all steps that gave a token."""
    step_began: float = 0.0
    """`time.monotonic()` at which the step in progress began; 0 between two steps. A backend that hangs shows here."""
    step_s: float = 0.0
    host_s: float = 0.0
    preemptions: int = 0
    state_bytes: int = 0
    """Memory that all slots hold whatever they read: states, and cache rows that are there from the start."""
    cache_limit: int = 0
    """What `cache_bytes` may become."""
    prefix_apart: bool = False
    """Whether beginnings of prompts are in other memory, which `cache_bytes` does not count."""
    prefix: PrefixStatistics = field(default_factory=PrefixStatistics)
    measure: Callable[[], dict[int, int]] = field(default=dict, repr=False)

    @property
    def sequence_bytes(self) -> dict[int, int]:
        """Memory of the cache rows of each running sequence, by slot, beyond `state_bytes`."""
        return self.measure()

    @property
    def cache_bytes(self) -> int:
        """Memory in use: states, running sequences and beginnings of prompts."""
        return self.state_bytes + sum(self.sequence_bytes.values()) + (0 if self.prefix_apart else self.prefix.bytes)
