"""Memory of DirectML's allocator."""

from __future__ import annotations

import numpy as np

from qwen_export.runtimes.memory.buffers import NUMPY, Buffer, Bytes, as_bytes


class DmlBuffer(Buffer):
    """Memory of DirectML's allocator. It has no address that a binding could be given: it is bound as a value of ONNX Runtime, and written
    and read whole."""

    device = "dml"

    def __init__(self, dtype: str, shape: tuple[int, ...], device_id: int = 0) -> None:
        import onnxruntime as ort

        super().__init__(dtype, shape)
        self.address = 0
        self.value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, NUMPY[dtype]), self.device, device_id)

    def read(self, offset: int = 0, nbytes: int | None = None) -> Bytes:
        return as_bytes(self.value.numpy())[offset : None if nbytes is None else offset + nbytes].copy()

    def write(self, data: Bytes, offset: int = 0) -> None:
        if data.nbytes != self.nbytes:
            whole = self.read()
            whole[offset : offset + data.nbytes] = data
            data = whole
        self.value.update_inplace(np.ascontiguousarray(data).view(NUMPY[self.dtype]).reshape(self.shape))

    def copy_from(self, other: Buffer, offset: int, start: int, nbytes: int) -> None:
        self.write(other.read(start, nbytes), offset)
