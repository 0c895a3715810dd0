"""The weights of a bundle in the memory of a GPU: copied there once, and used by all graphs of the bundle."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from qwen_export.errors import BundleError
from qwen_export.manifest import WeightSpec
from qwen_export.runtimes.memory import cuda_memory
from qwen_export.runtimes.memory.cuda_driver import memory_info
from qwen_export.runtimes.memory.cuda_stream import Stream
from qwen_export.runtimes.memory.mapped_weights import MappedWeights
from qwen_export.runtimes.memory.pinned_memory import PinnedMemory

ALIGNMENT = 256
"""The alignment that TensorRT requires of every address."""
_CHUNK = 16 << 20

Place = tuple[str, int]
"""File and offset of a weight, which graphs may share."""


def arrange(weights: Iterable[WeightSpec], nbytes: dict[Place, int], placed: Iterable[Place] = ()) -> tuple[dict[Place, int], int]:
    """Offsets, multiples of ALIGNMENT, for weights in one piece of memory, in the order of the files, and the size of the piece. Those in
    `placed` have their place already."""
    offsets: dict[Place, int] = {}
    end = 0
    for place in sorted({place_of(weight) for weight in weights} - set(placed)):
        offsets[place] = end
        end += -(-nbytes[place] // ALIGNMENT) * ALIGNMENT
    return offsets, end


def place_of(weight: WeightSpec) -> Place:
    return weight.file, weight.offset


class DeviceWeights:
    """Grows with each graph that is opened; what an earlier graph brought along is not copied again."""

    def __init__(self, weights: MappedWeights, stream: Stream) -> None:
        self._weights, self._stream = weights, stream
        self._addresses: dict[Place, int] = {}
        self._pieces: list[int] = []
        self.nbytes = 0
        """Bytes on the device."""

    def __del__(self) -> None:
        if not sys.is_finalizing():
            for address in getattr(self, "_pieces", ()):
                cuda_memory.free(address)

    def upload(self, specs: Iterable[WeightSpec]) -> None:
        """Bring these weights to the device. Raises BundleError when they do not fit."""
        needed = {place_of(spec): spec for spec in specs if place_of(spec) not in self._addresses}
        if not needed:
            return
        sizes = {place: self._weights.bytes(spec).nbytes for place, spec in needed.items()}
        offsets, size = arrange(needed.values(), sizes)
        free, total = memory_info()
        if size > free:
            raise BundleError(
                "the weights do not fit the free memory of the GPU",
                got=f"{free / 2**30:.2f} GiB free of {total / 2**30:.2f} GiB",
                expected=f"{size / 2**30:.2f} GiB, and room for the context",
                fix="End other programs that use the GPU, or build with {precision} int4.",
            )
        base = cuda_memory.allocate_raw(size)
        self._pieces.append(base)
        turns = [PinnedMemory(_CHUNK), PinnedMemory(_CHUNK)]
        turn = 0
        for place, offset in offsets.items():
            data = self._weights.bytes(needed[place])
            for start in range(0, data.nbytes, _CHUNK):
                part, pinned = data[start : start + _CHUNK], turns[turn]
                pinned.array[: part.nbytes] = part  # while the copy before this one is under way
                self._stream.synchronize()
                cuda_memory.to_device_later(base + offset + start, pinned.address, part.nbytes, self._stream.handle)
                turn = 1 - turn
            self._weights.release([needed[place]])
        self._stream.synchronize()
        self._addresses |= {place: base + offset for place, offset in offsets.items()}
        self.nbytes += size

    def address(self, spec: WeightSpec) -> int:
        return self._addresses[place_of(spec)]
