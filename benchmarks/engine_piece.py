"""One small engine made of a few nodes: built, run as a CUDA graph and timed."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from qwen_export.engine_options import EngineOptions
from qwen_export.plugins.emitter import Emitter
from qwen_export.plugins.tensorrt.build_engine import build_engine
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import Library

FLOAT, HALF, BF16, I32, I64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT32, ir.DataType.INT64
TORCH = {
    FLOAT: torch.float32,
    HALF: torch.float16,
    BF16: torch.bfloat16,
    I32: torch.int32,
    I64: torch.int64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT4: torch.uint8,
    ir.DataType.FLOAT8E4M3FN: torch.uint8,
    ir.DataType.INT8: torch.int8,
}
Inputs = Mapping[str, tuple[tuple[int, ...], ir.DataType]]
Body = Callable[[Emitter, dict[str, ir.Value]], Sequence[ir.Value]]


@dataclass(frozen=True)
class Case:
    """One engine: `body` emits it from `inputs`. `aliased` maps outputs to the inputs that they are written over, and
    inputs to others whose memory they read."""

    name: str
    inputs: Inputs
    body: Body
    tf32: bool = False
    aliased: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[dict[str, torch.Tensor], list[torch.Tensor]], str] | None = None
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    emitter: type[Emitter] = Emitter


def model_of(case: Case) -> bytes:
    values = {name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)) for name, (shape, dtype) in case.inputs.items()}
    graph = ir.Graph(list(values.values()), [], nodes=[], name="piece", opset_imports={"": 24})
    emit = case.emitter(graph, "n")
    for i, value in enumerate(case.body(emit, values)):
        value.name = f"out{i}"
        graph.outputs.append(value)
    graph.extend(emit.nodes)
    proto = ir.to_proto(ir.Model(graph, ir_version=11))
    return bytes(proto.SerializeToString())


class Engine:
    """A built engine with its buffers, replayed as a CUDA graph."""

    def __init__(self, library: Library, case: Case, options: EngineOptions) -> None:
        api = library.api
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "engine"
            started = time.monotonic()
            self.layers = build_engine(library, model_of(case), path, options, where=case.name).layers
            self.build_s = time.monotonic() - started
            self.runtime = api.Runtime(library.log)
            self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise SystemExit(f"{case.name}: {library.take_messages()}")
        self.context = self.engine.create_execution_context()
        self.buffers: dict[str, torch.Tensor] = {}
        torch.manual_seed(0)
        for i in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(i)
            dtype = ir.DataType[
                {"FLOAT": "FLOAT", "HALF": "FLOAT16", "BF16": "BFLOAT16", "FP8": "FLOAT8E4M3FN"}.get(
                    self.engine.get_tensor_dtype(name).name, self.engine.get_tensor_dtype(name).name
                )
            ]
            shape = tuple(self.engine.get_tensor_shape(name))
            if name in case.aliased:
                if name in case.inputs:
                    continue
                alias = self.engine.get_aliased_input_tensor(name) if hasattr(self.engine, "get_aliased_input_tensor") else None
                print(f"    {name} is the memory of {alias!r}, says the engine")
                continue
            self.buffers[name] = case.values[name].cuda() if name in case.values else _random(shape, dtype)
        for name, source in case.aliased.items():
            self.buffers[name] = self.buffers[source]
        for name, tensor in self.buffers.items():
            if not self.context.set_tensor_address(name, tensor.data_ptr()):
                raise SystemExit(f"{case.name}: {library.take_messages()}")
        self.outputs = [self.buffers[f"out{i}"] for i in range(sum(name.startswith("out") for name in self.buffers))]

    def run(self) -> None:
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise SystemExit("the engine did not run")

    def measure(self, repeats: int = 20, inner: int = 10) -> tuple[float, float]:
        """Milliseconds per call: as a CUDA graph, and launched layer by layer."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run()
            stream.synchronize()
            eager = self._time(self.run, repeats, 1)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=stream):
                    for _ in range(inner):
                        self.run()
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph: {error}", stacklevel=1)
                return float("nan"), eager
            return self._time(graph.replay, repeats, inner), eager

    def _time(self, call: Callable[[], None], repeats: int, inner: int) -> float:
        times = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / inner)
        return statistics.median(times)

    def kernels(self) -> list[str]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            self.run()
            torch.cuda.synchronize()
        return [f"{event.device_time_total:8.1f} us {event.count:4d} x {event.key[:110]}" for event in traced.key_averages()]


def _random(shape: tuple[int, ...], dtype: ir.DataType) -> torch.Tensor:
    if dtype in (I32, I64):
        return torch.zeros(shape, dtype=TORCH[dtype], device="cuda")
    if dtype == ir.DataType.BOOL:
        return torch.ones(shape, dtype=torch.bool, device="cuda")
    if dtype == ir.DataType.INT4:
        return torch.randint(0, 255, (int(np.prod(shape)) // 2,), dtype=torch.uint8, device="cuda")
    if dtype == ir.DataType.FLOAT8E4M3FN:
        return torch.randint(0, 64, shape, dtype=torch.uint8, device="cuda")
    if dtype == ir.DataType.INT8:
        return torch.randint(-127, 127, shape, dtype=torch.int8, device="cuda")
    return (torch.randn(shape, device="cuda") * 0.05).to(TORCH[dtype])
