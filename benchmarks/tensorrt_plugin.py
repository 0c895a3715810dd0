"""Device time of our plugin's kernel, as TensorRT launches it.

    python -m benchmarks.tensorrt_plugin

Steps of a DeltaNet layer with heads of 128, a hundred to a CUDA graph on states of their own; the median of 20 replays. The native layers'
times are those of `tensorrt_recurrence.py --only decode,verify`, which have only the recurrence: here the convolution, the gates and
the gated norm are in the time, too.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from qwen_export.plugins.native.native_library import find_ptx
from qwen_export.runtimes.backends.tensorrt.delta_net_plugin import StepFields, launch, pack_ptx
from qwen_export.runtimes.memory.buffers import encode
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer
from qwen_export.runtimes.memory.cuda_stream import Stream

D, LAUNCHES, REPLAYS = 128, 100, 20
EPS = int(np.float32(1e-6).view(np.int32))


def microseconds(dtype: str, T: int, P: int, Hk: int, Hv: int) -> float:
    path = find_ptx(dtype)
    if path is None:
        raise SystemExit("plugins/native/build_ptx.sh has not been run")
    fields = StepFields(f"qwen_delta_net_{'verify' if P else 'step'}_{D}", pack_ptx(path.read_bytes()), T, P, Hk, Hv, D, EPS)
    C = (2 * Hk + Hv) * D
    width = C + Hv * D + 2 * Hv
    rng, stream = np.random.default_rng(0), Stream()

    def buffer(kind: str, *shape: int) -> CudaBuffer:
        made = CudaBuffer(kind, shape)
        made.write(encode((rng.standard_normal(shape) * 0.1).astype(np.float32), kind))
        return made

    def counts(value: int) -> CudaBuffer:
        made = CudaBuffer("int32", (1,))
        made.write_ints([value])
        return made

    calls = []
    for _ in range(LAUNCHES):
        inputs = [buffer(dtype, 1, T, width), buffer(dtype, C, 4), buffer("float", Hv), buffer("float", Hv), buffer(dtype, D)]
        inputs += [buffer(dtype, 1, 3, C), buffer("float", 1, Hv, D, D)]
        if P:
            inputs += [buffer(dtype, 1, P, width), counts(P // 2), counts(0)]
        outputs = [CudaBuffer(dtype, (1, T, Hv * D)), CudaBuffer(dtype, (1, 3, C)), CudaBuffer("float", (1, Hv, D, D))]
        calls.append((inputs, outputs))

    def queue() -> None:
        for inputs, outputs in calls:
            launch(fields, [b.address for b in inputs], [b.address for b in outputs], stream.handle)

    queue()
    stream.synchronize()
    recording, seconds = stream.record(queue), []
    for _ in range(REPLAYS):
        started = time.perf_counter()
        recording.launch()
        stream.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) / LAUNCHES * 1e6


def main() -> None:
    print("| key, value heads | tokens | pending | fp16, us | bf16, us |\n|---|---|---|---|---|")
    for Hk, Hv in ((16, 16), (16, 32)):
        for T, P in ((1, 0), (2, 2), (4, 4), (9, 9)):
            times = [microseconds(dtype, T, P, Hk, Hv) for dtype in ("float16", "bfloat16")]
            print(f"| {Hk}, {Hv} | {T} | {P} | " + " | ".join(f"{t:.1f}" for t in times) + " |", flush=True)


if __name__ == "__main__":
    main()
