"""Memory with a copy on each of several devices: what all stages of a model read, such as token ids and rotary tables."""

from __future__ import annotations

from collections.abc import Mapping

from qwen_export.runtimes.memory.buffers import Buffer, Bytes
from qwen_export.runtimes.memory.device import Device


class MirroredBuffer(Buffer):
    """Copies of equal contents by device. Only writes change them; a graph is bound to the copy on its device."""

    def __init__(self, copies: Mapping[Device, Buffer]) -> None:
        self._copies = dict(copies)
        first = next(iter(self._copies.values()))
        super().__init__(first.dtype, first.shape)
        self.address = first.address

    def on(self, kind: str, index: int) -> Buffer:
        return self._copies[Device(kind, index)]

    def read(self, offset: int = 0, nbytes: int | None = None) -> Bytes:
        return next(iter(self._copies.values())).read(offset, nbytes)

    def write(self, data: Bytes, offset: int = 0) -> None:
        for copy in self._copies.values():
            copy.write(data, offset)

    def copy_from(self, other: Buffer, offset: int, start: int, nbytes: int) -> None:
        for device, copy in self._copies.items():
            copy.copy_from(other.on(device.kind, device.index), offset, start, nbytes)

    def alike(self, nbytes: int) -> Buffer:
        return MirroredBuffer({device: copy.alike(nbytes) for device, copy in self._copies.items()})

    def part(self, dtype: str, shape: tuple[int, ...], offset: int = 0) -> Buffer:
        return MirroredBuffer({device: copy.part(dtype, shape, offset) for device, copy in self._copies.items()})
