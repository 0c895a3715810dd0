"""A graph call of one shape with everything bound: only token ids and lengths change from run to run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qwen_export.manifest import TensorSpec
from qwen_export.runtimes.buffers import BUFFERS, Buffer, HostBuffer, as_bytes
from qwen_export.runtimes.onnxruntime_session import HOST_INPUTS, Session


class CallShape(NamedTuple):
    """`b` sequences from row `first` of every buffer, `T` new tokens each, logits of the last `rows`. `repeated`: a decode step."""

    b: int
    T: int
    rows: int
    first: int
    repeated: bool


class BoundCall:
    """Bindings of one shape over a decoder's buffers; `slots` is the size of its caches."""

    def __init__(self, session: Session, shape: CallShape, states: Mapping[str, Buffer], tables: Mapping[str, Buffer], slots: int) -> None:
        self._call = session.call(repeated=shape.repeated)
        self._T, self._slots = shape.T, slots
        self.recorded = session.device == "cuda" and shape.repeated
        self._controls: dict[str, Buffer] = {}
        kind = BUFFERS[session.device]
        dims = {"B": shape.b, "T": shape.T, "N": shape.rows, "S": slots}

        def size(spec: TensorSpec) -> tuple[int, ...]:
            return tuple(d if isinstance(d, int) else dims[d] for d in spec.shape)

        for spec in session.spec.inputs:
            if spec.name in states:
                self._call.input(spec.name, size(spec), states[spec.name].row_address(shape.first))
            elif spec.name in tables:
                self._call.input(spec.name, tables[spec.name].shape, tables[spec.name].address)
            else:
                control = (HostBuffer if spec.name in HOST_INPUTS else kind)(spec.dtype, size(spec))
                self._controls[spec.name] = control
                self._call.input(spec.name, size(spec), control.address)
        after = {state.after: states[state.name] for state in session.spec.states}
        for spec in session.spec.outputs:
            if spec.name in after:
                self._call.output(spec.name, size(spec), after[spec.name].row_address(shape.first))
            else:
                self._logits = kind(spec.dtype, size(spec))
                self._call.output(spec.name, size(spec), self._logits.address)
        self._controls["logit_rows"].write(as_bytes(np.arange(shape.T - shape.rows, shape.T, dtype=np.int64)))

    def run(self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """`ids` [b,T] new tokens, `lengths` [b] tokens read before; returns logits f32[b,rows,V], valid until the next run."""
        self._controls["input_ids"].write(as_bytes(ids))
        self._controls["last_slot"].write(as_bytes(lengths + np.int32(self._T - 1)))
        # A recorded step keeps the value it was recorded with: the number of slots is right for all of them.
        total = self._slots if self.recorded else int(lengths.max()) + self._T
        self._controls["total_length"].write(as_bytes(np.array(total, np.int32)))
        self._call.run()
        return self._logits.array()
