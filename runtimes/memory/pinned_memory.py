"""Locked host memory: copies between it and a GPU are queued like kernels, recorded with them, and run at the speed of the bus."""

from __future__ import annotations

import ctypes
import weakref

import numpy as np

from qwen_export.runtimes.memory import cuda_memory
from qwen_export.runtimes.memory.buffers import Bytes
from qwen_export.runtimes.memory.host_buffer import HostBuffer


class PinnedMemory:
    """Locked host memory as a numpy array, which lives as long as any view of it."""

    def __init__(self, nbytes: int) -> None:
        self.address = cuda_memory.allocate_pinned(nbytes)
        memory = (ctypes.c_uint8 * max(1, nbytes)).from_address(self.address)
        weakref.finalize(memory, cuda_memory.free_pinned, self.address).atexit = False
        self.array: Bytes = np.ctypeslib.as_array(memory)[:nbytes]


class PinnedBuffer(HostBuffer):
    """A buffer of the host in locked memory."""

    def _allocate(self) -> Bytes:
        memory = PinnedMemory(self.nbytes).array
        memory[:] = 0
        return memory
