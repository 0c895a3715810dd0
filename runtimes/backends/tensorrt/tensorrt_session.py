"""A graph compiled by TensorRT as a session: memory on its GPU, and calls whose every input and output is bound by address."""

from __future__ import annotations

import time

from qwen_export.errors import BundleError
from qwen_export.manifest import GraphSpec
from qwen_export.runtimes.backends.tensorrt.tensorrt_engines import Context, Engine
from qwen_export.runtimes.backends.whole_session import WholeCall, WholeSession
from qwen_export.runtimes.decoding.logit_rows import TOP_IDS, TOP_LOGITS
from qwen_export.runtimes.memory.buffers import Buffer
from qwen_export.runtimes.memory.cuda_driver import use_device
from qwen_export.runtimes.memory.device import Device
from qwen_export.runtimes.memory.stream_buffer import StreamBuffer

# What a token is chosen from: every call copies it to the host. All logits stay on the device until they are read.
_FETCHED = (TOP_LOGITS, TOP_IDS)


class TensorRTSession(WholeSession):
    """One graph of a bundle. Sessions of one bundle share `engines`."""

    records = False  # a call's second run is the recording, and runs once

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.device = Device("cuda", engine.engines.stream.device_id)
        self.spec: GraphSpec = engine.spec
        self.busy_s = 0.0
        """Seconds spent in calls so far, without those of `binding_s`."""
        self.binding_s = 0.0
        """Seconds of calls that were also prepared, once for each: contexts, kernels compiled on this machine, recording."""

    def buffer(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        """Memory on the session's device."""
        use_device(self.engine.engines.stream.device_id)
        return StreamBuffer(dtype, shape, self.engine.engines.stream)

    def call(self, *, repeated: bool) -> TensorRTCall:
        """Bindings for one set of buffers. `repeated` has no effect here: shapes are fixed, so every call that comes back is recorded."""
        return TensorRTCall(self)

    def close(self) -> None:
        """Nothing: engines are released in order, when the last reference to their bundle goes."""


class TensorRTCall(WholeCall):
    """A set of bindings that is run again and again. The first run is queued kernel by kernel, which lets the library finish what it does
    once; the second is recorded as a CUDA graph, which runs from then on. No call runs more often than requested."""

    def __init__(self, session: TensorRTSession) -> None:
        self._session = session
        self._stream = session.engine.engines.stream
        self._buffers: dict[str, Buffer] = {}
        self._outputs: list[StreamBuffer] = []
        self._fetched: list[StreamBuffer] = []
        self._context: Context | None = None
        self._recordable = True

    def bind_input(self, name: str, buffer: Buffer) -> None:
        """The whole of a buffer."""
        self._buffers[name] = buffer

    def bind_output(self, name: str, buffer: Buffer) -> None:
        assert isinstance(buffer, StreamBuffer)
        self._buffers[name] = buffer
        self._outputs.append(buffer)
        if name in _FETCHED:
            self._fetched.append(buffer)

    def prepare(self) -> None:
        """Do now what the first runs would do besides running: compile, and record. The call runs once, so the controls must be such that
        nothing is committed and caches are written behind what was read; then the run that follows leaves the same."""
        started = time.perf_counter()
        if self._context is None:
            self._start()
        if self._recordable:
            self._record()
        self._count(started, once=True)

    @property
    def recorded(self) -> bool:
        """Whether the call runs as a CUDA graph."""
        return self._context is not None and self._context.recording is not None

    def run(self) -> None:
        """Run and wait. The largest logits are on the host then."""
        started, once = time.perf_counter(), self._recordable
        if self._context is None:
            self._start()
        else:
            use_device(self._stream.device_id)
            if self._recordable:
                self._record()
            if self._context.recording is not None:
                self._context.recording.launch()
            else:
                self._queue(self._context)
            self._finish()
        self._count(started, once=once)

    def _start(self) -> None:
        """The first run, and what the library compiles for it."""
        use_device(self._stream.device_id)
        self._context = self._bound_context()
        self._queue(self._context)
        self._finish()
        self._session.engine.keep_kernels()

    def _queue(self, context: Context) -> None:
        context.queue()
        for buffer in self._fetched:
            buffer.fetch_later()

    def _finish(self) -> None:
        """Wait for what was queued."""
        for buffer in self._outputs:
            buffer.changed()
        self._stream.synchronize()
        for buffer in self._fetched:
            buffer.fetched()

    def _record(self) -> None:
        """Shapes are fixed and nothing branches, so a run is the same kernels every time. What the driver does not let into a recording
        ends it with an error; is_stream_capturable of TensorRT-RTX denies it for every engine that may allocate memory, and is not used."""
        context, self._recordable = self._context, False  # once is enough
        if context is None:
            return
        try:
            context.recording = self._stream.record(lambda: self._queue(context))
        except BundleError:  # such an engine runs all the same
            self._session.engine.engines.library.take_messages()

    def _count(self, started: float, *, once: bool) -> None:
        seconds = time.perf_counter() - started
        if once:
            self._session.binding_s += seconds
        else:
            self._session.busy_s += seconds

    def _bound_context(self) -> Context:
        spec = self._session.spec
        unbound = [tensor.name for tensor in (*spec.inputs, *spec.outputs) if tensor.name not in self._buffers]
        if unbound:
            raise AssertionError(f"not bound: {', '.join(unbound)}")
        context = self._session.engine.context()
        for name, buffer in self._buffers.items():
            context.bind(name, buffer.address)
        return context
