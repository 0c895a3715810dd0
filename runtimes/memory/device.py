"""A device: what kind it is, and which of several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwen_export.errors import ParameterError
from qwen_export.runtimes.memory.buffers import Buffer
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer
from qwen_export.runtimes.memory.directml_buffer import DmlBuffer
from qwen_export.runtimes.memory.host_buffer import HostBuffer

BUFFERS: dict[str, Callable[[str, tuple[int, ...], int], Buffer]] = {
    "cpu": lambda dtype, shape, index: HostBuffer(dtype, shape),
    "cuda": lambda dtype, shape, index: CudaBuffer(dtype, shape, index),
    "dml": lambda dtype, shape, index: DmlBuffer(dtype, shape, index),
}
"""How memory is allocated, by kind of device: from element type, shape and the device's index."""


@dataclass(frozen=True)
class Device:
    """`kind` is "cpu", "cuda" or "dml", as in the manifest; `index` is the number of the device among those of its kind."""

    kind: str
    index: int = 0

    def __post_init__(self) -> None:
        if self.index < 0:
            raise ParameterError(
                "the number of the device is negative",
                parameter="device_id",
                got=self.index,
                expected="at least 0",
                fix="Give 0 for the first device.",
            )

    def buffer(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        """Zeroed memory on this device. Raises BundleError when there is too little."""
        return BUFFERS[self.kind](dtype, shape, self.index)

    @property
    def is_host(self) -> bool:
        return self.kind == "cpu"

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"
