"""Memory of the states that do not grow: recurrent states and conv histories of all slots."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from qwen_export.manifest import StateSpec
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.memory.buffers import ELEMENTS, Buffer
from qwen_export.runtimes.memory.host_buffer import HostBuffer

_ALIGNMENT = 64


def recurrent_memory(session: Session, specs: Iterable[StateSpec], slots: int) -> dict[str, Buffer]:
    """Zeroed buffers [slots, ...] by name.

    On the host they are parts of one block in huge pages: a step reads and writes all states of its slots, and with pages of 4 KB the
    processor spends more time on addresses than on them. A slot that is never used then takes memory where it shares a page with one that
    is.
    """
    shapes = {spec.name: tuple(d if isinstance(d, int) else slots for d in spec.shape) for spec in specs}
    types = {spec.name: spec.dtype for spec in specs}
    made: dict[str, Buffer] = {}
    places: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        device = session.device_of(name)
        if device.is_host:
            places[name] = end
            end += -(-prod(shape) * ELEMENTS[types[name]][0] // _ALIGNMENT) * _ALIGNMENT
        else:
            made[name] = device.buffer(types[name], shape)
    block = HostBuffer("uint8", (end,))
    block.prefer_huge_pages(0, 0)
    return made | {name: block.part(types[name], shapes[name], place) for name, place in places.items()}
