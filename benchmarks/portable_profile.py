"""Where the time of one prompt call of target onnx goes, by operator, as ONNX Runtime's profiler counts it.

    python -m benchmarks.portable_profile BUNDLE [--graph prefill] [--calls 4] [--threads 1]

Milliseconds of the fastest call, by the clock on the wall. Gemm are the products with weights, which any form of the model has.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

_NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float16)": np.float16}
_SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--graph", default="prefill")
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = arguments.threads
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.disable_prepacking", "1")  # as the runtime has it
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        session = ort.InferenceSession(arguments.bundle / f"{arguments.graph}.onnx", options)
        given = {value.name: np.zeros(value.shape, _NUMPY[value.type]) for value in session.get_inputs()}
        if "commit" in given:
            given["commit"][:] = given["input_ids"].shape[1]
        for _ in range(arguments.calls):
            session.run(None, given)
        events = json.loads(Path(session.end_profiling()).read_text())
    calls = [event for event in events if event["name"] == "model_run"]
    fastest = min(calls, key=lambda event: int(event["dur"]))
    times: collections.Counter[str] = collections.Counter()
    nodes: collections.Counter[str] = collections.Counter()
    for event in events:
        inside = fastest["ts"] <= event["ts"] < fastest["ts"] + fastest["dur"]
        if inside and event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["args"]["op_name"]] += 1
            times[event["args"]["op_name"]] += event["dur"]
    total = sum(times.values())
    print(f"{sum(nodes.values())} nodes, {total / 1e3:.0f} ms")
    print("| operator | nodes | ms | share |\n|---|---|---|---|")
    for name, time in times.most_common(_SHOWN):
        print(f"| {name} | {nodes[name]} | {time / 1e3:.1f} | {time / total:.2f} |")


if __name__ == "__main__":
    main()
