"""A build whose graph has nothing but the weights: capturing the real one takes seconds.

`python -m tests.support.weights_only before build CHECKPOINT -o BUNDLE` is the command line of it, which waits for a signal: before the
first tensor is noted as finished, or with `after`, after that. At that time the last one is not written.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import onnx_ir as ir

from qwen_export.building.build_plan import BuildPlan
from qwen_export.commands import cli
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.tensor_names import decoder_tensors
from qwen_export.graphs.weights.expression import StoredWeight, add_weight
from qwen_export.graphs.weights.journal import Finished, Journal


def weights_only(source: Checkpoint, plan: BuildPlan, dump: Path | None) -> dict[str, ir.Model]:
    """In the place of `lower_graphs.lower`."""
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)
    for name, shape in decoder_tensors(source.config.text):
        add_weight(model.graph, name, StoredWeight(name, shape, ir.DataType.FLOAT))
    return {"decoder": model}


def waiting(when: str) -> Callable[[Journal, Finished], None]:
    """In the place of `Journal.append`."""
    note = Journal.append

    def append(journal: Journal, finished: Finished) -> None:
        if when == "after":
            note(journal, finished)
        while True:
            time.sleep(0.01)

    return append


@contextmanager
def as_planned(source: Checkpoint, plan: BuildPlan, *_: object) -> Iterator[tuple[BuildPlan, dict[str, object]]]:
    """In the place of `calibrate_model.calibrated`, for a build that is not calibrated."""
    yield plan, {}


def stand_in(name: str, **members: object) -> None:
    """A module in the place of one that would load torch, which takes seconds."""
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(members)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored by what they start in the background
    stand_in("qwen_export.building.lower_graphs", lower=weights_only)
    stand_in("qwen_export.building.calibration.calibrate_model", calibrated=as_planned)
    Journal.append = waiting(sys.argv[1])  # type: ignore[method-assign]
    cli.main(sys.argv[2:])
