"""The one module that talks to OpenVINO: opening a graph, and calls whose inputs and outputs are the runtime's own memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_export.errors import BundleError
from qwen_export.manifest import GraphSpec
from qwen_export.runtimes.backends.whole_session import LateSession, WholeCall
from qwen_export.runtimes.memory.buffers import NUMPY, Buffer
from qwen_export.runtimes.memory.device import Device


class OpenVinoSession(LateSession):
    """One graph, compiled for the CPU. `options`: properties of OpenVINO (`openvino_options.py`). With `later` it is compiled before its
    first call, which most runs may never make."""

    records = False

    def __init__(self, path: Path, spec: GraphSpec, options: dict[str, Any], *, later: bool = False) -> None:
        self.spec, self.device = spec, Device("cpu")
        self._path, self._options = path, options
        super().__init__(later=later)

    def _open(self) -> Any:
        import openvino

        try:
            return openvino.Core().compile_model(str(self._path), "CPU", self._options)
        except Exception as error:  # its exceptions are RuntimeErrors of many lines
            raise BundleError(
                "OpenVINO could not compile the graph",
                where=str(self._path),
                got=last_line(error),
                fix="Run `qwen-export check` on the bundle, or load it without {runtime}.",
            ) from error

    def buffer(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        return self.device.buffer(dtype, shape)

    def call(self, *, repeated: bool) -> OpenVinoCall:
        return OpenVinoCall(self)


class OpenVinoCall(WholeCall):
    """An infer request of a session."""

    def __init__(self, session: OpenVinoSession) -> None:
        self._session = session
        self._request = session.native.create_infer_request()

    def bind_input(self, name: str, buffer: Buffer) -> None:
        self._bind(name, buffer)

    def bind_output(self, name: str, buffer: Buffer) -> None:
        self._bind(name, buffer)

    def _bind(self, name: str, buffer: Buffer) -> None:
        import openvino

        self._request.set_tensor(name, openvino.Tensor(_array(buffer), shared_memory=True))

    def prepare(self) -> None:
        """Nothing: the first run of a call is like the others."""

    def run(self) -> None:
        started = time.perf_counter()
        try:
            self._request.infer()
        except Exception as error:
            raise BundleError(
                "OpenVINO failed while running the graph",
                got=last_line(error),
                fix="If memory ran out, load with a smaller {max_context}; otherwise run `qwen-export check` on the bundle.",
            ) from error
        finally:
            self._session.busy_s += time.perf_counter() - started


def _array(buffer: Buffer) -> npt.NDArray[Any]:
    """The memory of a buffer on the host, as the graph sees it."""
    return np.asarray(buffer.contents()).view(NUMPY[buffer.dtype]).reshape(buffer.shape)


def last_line(error: Exception) -> str:
    """Where a message of OpenVINO says what happened: the lines before are places in its sources."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
