"""Integer inputs of calls: what is set arrives where the graph reads it, on a device with one copy."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_export.runtimes.decoding.controls import Controls
from qwen_export.runtimes.memory.buffers import Bytes
from qwen_export.runtimes.memory.device import BUFFERS, Device
from qwen_export.runtimes.memory.host_buffer import HostBuffer

SPECS = {"input_ids": ("int64", (1, 3)), "length": ("int32", (1,)), "total_length": ("int32", (1,))}


class Remote(HostBuffer):
    """Memory that the host reaches by copies only, which are counted."""

    copies = 0

    def write(self, data: Bytes, offset: int = 0) -> None:
        Remote.copies += 1
        super().write(data, offset)

    def part(self, dtype: str, shape: tuple[int, ...], offset: int = 0) -> Remote:
        return Remote(dtype, shape, self, offset)


def read(controls: Controls, name: str, dtype: type) -> list[int]:
    return list(controls.buffers[name].read().view(dtype).tolist())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_set_arrives(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUFFERS, "cuda", lambda dtype, shape, index: Remote(dtype, shape))
    Remote.copies = 0
    controls = Controls(None if device == "cpu" else Device(device).buffer, SPECS, on_host=["total_length"])
    for first in (5, 9):
        controls.set("input_ids", [first, 6, 7])
        controls.set("length", [first * 10])
        controls.set("total_length", [99])
        controls.set("unknown", [1])
        controls.send()
        assert read(controls, "input_ids", np.int64) == [first, 6, 7]
        assert read(controls, "length", np.int32) == [first * 10] and read(controls, "total_length", np.int32) == [99]
    controls.send()
    assert Remote.copies == (2 if device == "cuda" else 0), "one copy a run, none without a change"
    assert all(buffer.address % 4 == 0 for buffer in controls.buffers.values())
    assert (type(controls.buffers["total_length"]) is HostBuffer) and (device == "cpu" or type(controls.buffers["length"]) is Remote)
