"""A build whose graph has nothing but the weights: capturing the real one takes seconds.

`python -m tests.support.weights_only build CHECKPOINT -o BUNDLE` is the command line of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx_ir as ir

from qwen_export.building import lower_graphs as lowering
from qwen_export.building.build_plan import BuildPlan
from qwen_export.commands import cli
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.tensor_names import decoder_tensors
from qwen_export.graphs.weights.expression import StoredWeight, add_weight


def weights_only(source: Checkpoint, plan: BuildPlan, dump: Path | None) -> dict[str, ir.Model]:
    """In the place of `lowering.lower`."""
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)
    for name, shape in decoder_tensors(source.config.text):
        add_weight(model.graph, name, StoredWeight(name, shape, ir.DataType.FLOAT))
    return {"decoder": model}


if __name__ == "__main__":
    lowering.lower = weights_only
    cli.main(sys.argv[1:])
