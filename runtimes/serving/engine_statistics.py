"""The figures of an engine, to watch and to size it."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_export.runtimes.serving.prefix_cache import PrefixStatistics


@dataclass
class EngineStatistics:
    """`steps` and seconds since the engine began; `host_s` is what steps took outside the backend and its bindings."""

    slots: int = 0
    longest: int = 0
    """Tokens that a sequence may have."""
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
    cache_bytes: int = 0
    """Memory that the running sequences use."""
    cache_limit: int = 0
    prefix: PrefixStatistics = field(default_factory=PrefixStatistics)
