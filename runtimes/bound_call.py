"""A graph call of one shape with everything bound: only the controls (token ids, lengths, ...) change from run to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen_export.manifest import TensorSpec
from qwen_export.runtimes.buffers import BUFFERS, Buffer, HostBuffer
from qwen_export.runtimes.logits import TOP_IDS, TOP_LOGITS, LogitsBuffers, Rows
from qwen_export.runtimes.onnxruntime_session import HOST_INPUTS, Session


class BoundCall:
    """`dims` are the sizes of the call. Inputs and outputs named in `inputs` and `outputs` lie at these addresses; the other inputs are
    the controls, the other outputs the logits and the largest of them, and get memory here. A `repeated` call is worth recording, where
    the device can."""

    def __init__(
        self, session: Session, dims: Mapping[str, int], inputs: Mapping[str, int], outputs: Mapping[str, int], *, repeated: bool
    ) -> None:
        self._call = session.call(repeated=repeated)
        self._T, self._slots = dims["T"], dims["S"]
        self.recorded = session.device == "cuda" and repeated
        self._controls: dict[str, Buffer] = {}
        kind = BUFFERS[session.device]

        def size(spec: TensorSpec) -> tuple[int, ...]:
            return tuple(d if isinstance(d, int) else dims[d] for d in spec.shape)

        for spec in session.spec.inputs:
            if spec.name not in inputs:
                self._controls[spec.name] = (HostBuffer if spec.name in HOST_INPUTS else kind)(spec.dtype, size(spec))
            self._call.input(spec.name, size(spec), inputs[spec.name] if spec.name in inputs else self._controls[spec.name].address)
        self.results: dict[str, Buffer] = {}
        """Outputs that got memory here."""
        for spec in session.spec.outputs:
            if spec.name not in outputs:
                self.results[spec.name] = kind(spec.dtype, size(spec))
            self._call.output(spec.name, size(spec), outputs[spec.name] if spec.name in outputs else self.results[spec.name].address)
        self._logits = LogitsBuffers(self.results["logits"], self.results.get(TOP_LOGITS), self.results.get(TOP_IDS))
        if dims["N"]:
            self._controls["logit_rows"].write_ints(range(self._T - dims["N"], self._T))

    def run(self, ids: Sequence[int], lengths: Sequence[int], **controls: Sequence[int]) -> Rows:
        """`ids` [b,T] new tokens, sequence after sequence, `lengths` [b] tokens read before; `controls` are written where the graph has
        them. Returns the logits of b times `rows` rows, valid until the next run."""
        self._write("input_ids", ids)
        self._write("last_slot", [length + self._T - 1 for length in lengths])
        # A recorded step keeps the value it was recorded with: the number of slots is right for all of them.
        self._write("total_length", [self._slots if self.recorded else max(lengths) + self._T])
        for name, value in controls.items():
            self._write(name, value)
        self._call.run()
        return self._logits.rows()

    def _write(self, name: str, values: Sequence[int]) -> None:
        if name in self._controls:
            self._controls[name].write_ints(values)
