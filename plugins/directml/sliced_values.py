"""Graphs that DirectML's compiler refuses with "Invalid parameter" when the session is opened.

A computed value has one reader, Slice or Split, and of a part one elementwise operator is the one reader. It may write over the part,
which is in the memory of the whole, and the compiler finds that the sizes differ. Another reader of the whole or of the part avoids it,
and so does Gather instead of Slice. Seen with DirectML 1.15.4 (tests/directml).
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qwen_export.plugins.directml.shared_memory import ELEMENTWISE, only_reader, views


def sliced_values(graph: ir.Graph) -> Iterator[str]:
    """What is wrong with each such Slice or Split."""
    for node in graph:
        whole = node.inputs[0] if node.op_type in ("Slice", "Split") and not node.domain else None
        if whole is None or views(whole)[0].producer() is None or only_reader(whole) is not node:
            continue
        for part in node.outputs:
            reader = only_reader(part)
            if reader is not None and reader.op_type in ELEMENTWISE:
                yield f"{node.op_type} {node.name or ''}: nothing else reads {whole.name}, and only {reader.op_type} reads {part.name}"
