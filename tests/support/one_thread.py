"""Sessions of ONNX Runtime with one thread where a test names no number: by default they take every core, as the worker beside does, and
threads that wait for work keep a core busy."""

from __future__ import annotations

import onnxruntime as ort

_THREADS = ort.SessionOptions.intra_op_num_threads


class OneThread(ort.SessionOptions):
    """In the place of `onnxruntime.SessionOptions`."""

    def __init__(self) -> None:
        super().__init__()
        self.intra_op_num_threads = 0

    @property
    def intra_op_num_threads(self) -> int:
        return int(_THREADS.__get__(self))

    @intra_op_num_threads.setter
    def intra_op_num_threads(self, count: int) -> None:
        _THREADS.__set__(self, count or 1)
