"""Memory for features of pictures, which calls of decoder and draft head read instead of embeddings."""

from __future__ import annotations

from qwen_export.bundle_contract import FEATURES
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.memory.buffers import Buffer


def features_memory(session: Session, rows: int) -> Buffer | None:
    """For at most so many tokens per call; None where the graph reads text only."""
    spec = next((tensor for tensor in session.spec.inputs if tensor.name == FEATURES), None)
    return session.shared(spec.dtype, (rows, int(spec.shape[-1]))) if spec is not None else None


def rows_of(memory: Buffer, count: int) -> Buffer:
    """The first `count` rows, which may be none."""
    return memory.part(memory.dtype, (count, memory.shape[1]))
