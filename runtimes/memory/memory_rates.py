"""How fast this machine reads memory, measured in some milliseconds."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qwen_export.runtimes.memory import cuda_memory
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer
from qwen_export.runtimes.memory.cuda_driver import use_device
from qwen_export.runtimes.memory.pinned_memory import PinnedMemory

_LINK_BYTES, _HOST_BYTES, _ROUNDS = 64 << 20, 32 << 20, 4
"""Bytes of a copy to a GPU, and bytes that each thread reads: more than caches hold."""
_MOST_THREADS = 64


def link_rate(index: int) -> float:
    """Bytes per second from locked host memory to a GPU."""
    use_device(index)
    source, target = PinnedMemory(_LINK_BYTES), CudaBuffer("uint8", (_LINK_BYTES,), index)
    best = 0.0
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        cuda_memory.to_device(target.address, source.address, _LINK_BYTES)
        best = max(best, _LINK_BYTES / (time.perf_counter() - started))
    return best


def host_rate() -> float:
    """Bytes per second that the processor's cores together read from memory."""
    count = min(_MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    parts = np.ones((count, _HOST_BYTES // 8), np.uint64)
    best = 0.0
    with ThreadPoolExecutor(count) as threads:
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            list(threads.map(np.max, parts))
            best = max(best, parts.nbytes / (time.perf_counter() - started))
    return best
