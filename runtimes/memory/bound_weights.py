"""Weights that are inputs of graphs, each in the memory that it was given: of the GPU, or of the host, from which the GPU reads it over the
bus while a kernel runs. On the CPU they are the mapped file."""

from __future__ import annotations

from collections.abc import Collection
from threading import Lock

from qwen_export.manifest import WeightSpec
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer
from qwen_export.runtimes.memory.cuda_driver import use_device
from qwen_export.runtimes.memory.device import Device
from qwen_export.runtimes.memory.device_weights import Place, place_of
from qwen_export.runtimes.memory.mapped_weights import MappedWeights
from qwen_export.runtimes.memory.pinned_memory import PinnedMemory


class BoundWeights:
    """`on_host`: those that stay in host memory though graphs run on a GPU."""

    def __init__(self, weights: MappedWeights, device: Device, on_host: Collection[Place]) -> None:
        self._weights, self._device, self._on_host = weights, device, frozenset(on_host)
        self._copies: dict[Place, CudaBuffer | PinnedMemory] = {}
        self._lock = Lock()  # graphs may be opened in threads

    def address(self, weight: WeightSpec) -> int:
        """Where the device reads it. The memory lives as long as this object."""
        if self._device.is_host:
            return int(self._weights.bytes(weight).ctypes.data)
        place = place_of(weight)
        with self._lock:
            if place not in self._copies:
                self._copies[place] = self._copy(weight, on_host=place in self._on_host)
                self._weights.release([weight])
            return self._copies[place].address

    def _copy(self, weight: WeightSpec, *, on_host: bool) -> CudaBuffer | PinnedMemory:
        data = self._weights.bytes(weight)
        if on_host:
            # Locked memory has one address for the host and for all GPUs. (CUDA Driver API, unified addressing)
            use_device(self._device.index)
            pinned = PinnedMemory(data.nbytes)
            pinned.array[:] = data
            return pinned
        made = CudaBuffer("uint8", (data.nbytes,), self._device.index)
        made.write(data)
        return made
