"""What changes from run to run of a call (token ids, lengths, ...): integers in one piece of memory, which one copy moves to a device.
Calls that are recorded have that copy in their recording."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

from qwen_export.runtimes.memory.buffers import ELEMENTS, Buffer
from qwen_export.runtimes.memory.host_buffer import HostBuffer

# Where allocators of devices begin pieces of memory.
_ALIGNED = 256


class Controls:
    """Memory for integer inputs, dtype and shape by name. `make` allocates it on the device, None: there is none. Inputs in `on_host` stay
    there, whatever the device."""

    def __init__(
        self,
        make: Callable[[str, tuple[int, ...]], Buffer] | None,
        specs: Mapping[str, tuple[str, tuple[int, ...]]],
        on_host: Sequence[str] = (),
        host: Callable[[str, tuple[int, ...]], HostBuffer] = HostBuffer,
    ) -> None:
        """`host` makes the memory that `set` writes to."""
        starts, end = {}, 0
        for name, (dtype, shape) in specs.items():
            starts[name] = end
            end += -(-prod(shape) * ELEMENTS[dtype][0] // _ALIGNED) * _ALIGNED
        self.written = host("uint8", (end,))
        """All of it, on the host."""
        self.read: Buffer | None = make("uint8", (end,)) if make is not None else None
        """The same on the device."""
        self._changed = False
        self._written = {name: self.written.part(dtype, shape, starts[name]) for name, (dtype, shape) in specs.items()}
        self.buffers: dict[str, Buffer] = {
            name: self._written[name] if self.read is None or name in on_host else self.read.part(dtype, shape, starts[name])
            for name, (dtype, shape) in specs.items()
        }
        """Where a graph reads them."""

    def set(self, name: str, values: Sequence[int]) -> None:
        """Replace the whole contents of one, if there is one of that name."""
        if name in self._written:
            self._written[name].write_ints(values)
            self._changed = True

    def send(self) -> None:
        """Before a run that does not do it itself: what was set, to where the graph reads it."""
        if self._changed and self.read is not None:
            self.read.write(self.written.contents())
        self._changed = False
