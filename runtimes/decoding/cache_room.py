"""How the attention caches of a decoder with dynamic shapes get their memory. There are three ways:

full      all rows from the start: on the host, where memory that is not touched costs nothing, and for short contexts
alone     each sequence grows by itself (`growing_buffer.py`), where attention costs by the tokens read
together  all have as many rows, which double: ONNX Runtime's attention on CUDA costs by the rows allocated
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import lcm

from qwen_export.manifest import Manifest, StateSpec
from qwen_export.runtimes.memory.buffers import ELEMENTS, Buffer
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer
from qwen_export.runtimes.memory.cuda_driver import memory_info, use_device
from qwen_export.runtimes.memory.cuda_pages import has_pages
from qwen_export.runtimes.memory.device import Device
from qwen_export.runtimes.memory.growing_buffer import GrowingBuffer, row_multiple, row_step
from qwen_export.runtimes.memory.host_buffer import HostBuffer

BY_ROWS = "com.microsoft.GroupQueryAttention"
"""The operator whose time on CUDA follows the rows allocated."""
ROW_AXIS = 2
_FIRST_ROWS = 2048
_LONG_TEXT = 8192


class CacheRoom:
    """Memory for caches [B,Hkv,S,W] of `slots` sequences with up to `capacity` tokens. `rows` is S, of all of them."""

    def __init__(self, device: Device, manifest: Manifest, slots: int, capacity: int, specs: Iterable[StateSpec]) -> None:
        """`specs`: all caches that will be made."""
        self._device, self._slots, self._capacity = device, slots, capacity
        self._growing: list[GrowingBuffer] = []
        self._row_bytes, self._step_bytes = 0, 0
        self._step, self.rows = capacity, capacity
        if device.kind == "cuda":
            if BY_ROWS in manifest.target.operators or not has_pages(device.index):
                self.rows = min(capacity, _FIRST_ROWS)
            else:
                caches = [(spec.dtype, _sizes(spec, slots, 1), device.index) for spec in specs]
                step, multiple = min(row_step(*cache) for cache in caches), lcm(*(row_multiple(*cache) for cache in caches))
                if step < capacity:
                    self._step, self.rows = step, -(-capacity // multiple) * multiple
        self.alone = self._step < capacity
        self.together = self.rows < capacity
        """Whether calls must be bound again when the longest sequence outgrows `rows`."""
        self._held = [self._step] * slots
        """Rows that each slot has memory for, where it grows alone."""

    def make(self, spec: StateSpec, device: Device) -> Buffer:
        """A cache on a device, in which every slot has its first rows."""
        shape = _sizes(spec, self._slots, self.rows)
        self._row_bytes += shape[1] * shape[3] * ELEMENTS[spec.dtype][0]
        if self.alone:
            buffer = GrowingBuffer(spec.dtype, shape, device.index)
            for slot in range(self._slots):
                buffer.hold(slot, self._step)
            self._step_bytes += buffer.bytes_for(self._step)
            self._growing.append(buffer)
            return buffer
        made = device.buffer(spec.dtype, shape)
        if isinstance(made, HostBuffer):
            made.prefer_huge_pages(ROW_AXIS, _LONG_TEXT)
        return made

    def reach(self, slot: int, length: int) -> None:
        """Memory for `length` tokens of a slot, where it grows alone. Raises BundleError where there is too little; nothing is lost."""
        if length > self._held[slot] and self.alone:
            rows = min(self.rows, -(-length // self._step) * self._step)
            for buffer in self._growing:
                buffer.hold(slot, rows)
            self._held[slot] = rows

    def reach_all(self, slots: Sequence[int], lengths: Sequence[int], more: int, most: int) -> None:
        """The same for several slots that have so many tokens and get up to `more`, to `most` together."""
        if self.alone and max(lengths) + more > self._step:
            for slot, length in zip(slots, lengths, strict=True):
                self.reach(slot, min(most, length + more))

    def double(self, length: int, caches: Mapping[str, Buffer], used: int) -> dict[str, Buffer]:
        """Caches that grow together, with twice the rows until `length` tokens fit; the first `used` rows are copied."""
        while self.rows < length:
            self.rows = min(2 * self.rows, self._capacity)
        return self.grown(caches, used)

    def grown(self, caches: Mapping[str, Buffer], used: int) -> dict[str, Buffer]:
        """Caches with as many rows as all have now."""
        made: dict[str, Buffer] = {}
        for name, cache in caches.items():
            if not isinstance(cache, CudaBuffer):
                raise AssertionError("host caches have their full size from the start")
            made[name] = cache.grown(ROW_AXIS, self.rows, used)
        return made

    def release(self, slot: int, caches: Iterable[Buffer]) -> None:
        """The slot's text is forgotten: give back what it has beyond its first rows."""
        if self.alone:
            for buffer in self._growing:
                buffer.hold(slot, self._step)
            self._held[slot] = self._step
        else:
            for cache in caches:
                cache.release(slot * cache.row_bytes, cache.row_bytes)

    # ---- what it takes ----

    def fixed_bytes(self) -> int:
        """What one slot holds whatever it reads; where all grow together, what it holds when the longest is at the capacity."""
        if self._device.is_host:
            return 0
        return self._step_bytes if self.alone else self._row_bytes * self._capacity

    def bytes_for(self, length: int) -> int:
        """What a sequence of `length` tokens takes beyond that."""
        if self._device.is_host:
            return self._row_bytes * length
        if not self.alone:
            return 0
        return self._step_bytes * max(0, -(-length // self._step) - 1)

    def free_bytes(self) -> int | None:
        """What the GPUs have left, the fullest of them, None where caches do not grow."""
        if not self.alone:
            return None
        free = []
        for index in {buffer.index for buffer in self._growing}:
            use_device(index)
            free.append(memory_info()[0])
        return min(free)

    def held_bytes(self, slot: int) -> int:
        """What a slot on a GPU holds now beyond what it held from the start."""
        return self._step_bytes * (-(-self._held[slot] // self._step) - 1)


def _sizes(spec: StateSpec, slots: int, rows: int) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else {"B": slots, "S": rows}[d] for d in spec.shape)
