"""ONNX Runtime's CPU kernels behind a CUDA execution provider that is not there: memory is that of the fake driver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnxruntime as ort
import pytest

from qwen_export.runtimes.memory import cuda_driver


class Binding:
    """Bindings of ONNX Runtime that take the memory of a GPU for that of the host, and note which one it was."""

    def __init__(self, native: Any, seen: set[tuple[str, int]]) -> None:
        self.native, self.seen = native, seen

    def bind_input(self, name: str, kind: str, index: int, *more: Any) -> None:
        self.seen.add((kind, index))
        self.native.bind_input(name, "cpu", 0, *more)

    def bind_output(self, name: str, kind: str, index: int, *more: Any) -> None:
        self.seen.add((kind, index))
        self.native.bind_output(name, "cpu", 0, *more)


class CudaSession:
    """A session that was asked for a GPU and runs on the CPU."""

    bound: set[tuple[str, int]]
    providers: list[Any]
    ran: set[tuple[int, int]]
    """The devices that sessions and calls were for, and the contexts that the thread had then: kernels of plugins go by the latter when
    they are made and when they run."""

    def __init__(self, graph: Any, options: Any, providers: list[Any]) -> None:
        CudaSession.providers = providers
        options_given = providers[0][1] if isinstance(providers[0], tuple) else {}
        self._index = int(options_given["device_id"]) if options_given else None
        self._stream = int(options_given.get("user_compute_stream", 0))
        self._note_context()
        self._native = real_session(graph, options, providers=["CPUExecutionProvider"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def io_binding(self) -> Binding:
        return Binding(self._native.io_binding(), CudaSession.bound)

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        self._note_context()
        cuda_driver.driver().queue(self._stream, lambda: self._native.run_with_iobinding(binding.native))

    def _note_context(self) -> None:
        if self._index is not None:
            CudaSession.ran.add((self._index, cuda_driver.current_context()))


real_session = ort.InferenceSession


@contextmanager
def cuda_sessions() -> Iterator[type[CudaSession]]:
    """Sessions for CUDA run on the CPU; `bound` and `providers` of the class say what they were asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort, "InferenceSession", CudaSession)
        patch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
        CudaSession.bound, CudaSession.ran = set(), set()
        yield CudaSession
