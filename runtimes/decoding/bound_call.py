"""A graph call of one shape with everything bound: only the controls (token ids, lengths, ...) change from run to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from qwen_export.manifest import TensorSpec
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_session import HOST_INPUTS, Session
from qwen_export.runtimes.decoding.controls import Controls
from qwen_export.runtimes.decoding.logit_rows import TOP_IDS, TOP_LOGITS, LogitsBuffers, Rows
from qwen_export.runtimes.memory.buffers import BUFFERS, Buffer


class LogitsMemory:
    """Memory for what the calls of a graph say of next tokens. All calls leave their logits in one place, since they are valid until the
    next call only; it has room for `rows` rows, as many as steps and drafts need. A call with more, for measuring, gets its own."""

    def __init__(self, session: Session, rows: int) -> None:
        self._kind, self._rows = BUFFERS[session.device], rows
        self._specs = {spec.name: spec for spec in session.spec.outputs if spec.name in ("logits", TOP_LOGITS, TOP_IDS)}
        self._all: Buffer | None = None

    def take(self, dims: Mapping[str, int]) -> tuple[dict[str, Buffer], LogitsBuffers]:
        """Buffers of a call with these dims, by output."""
        shapes = {name: sizes(spec, dims) for name, spec in self._specs.items()}
        made = {"logits": self._logits(self._specs["logits"].dtype, shapes["logits"])}
        largest: Buffer | None = None
        if TOP_IDS in shapes:
            largest = self._kind("int32", (2, *shapes[TOP_IDS]))
            made[TOP_LOGITS] = largest.part(self._specs[TOP_LOGITS].dtype, shapes[TOP_LOGITS])
            made[TOP_IDS] = largest.part("int32", shapes[TOP_IDS], largest.nbytes // 2)
        return made, LogitsBuffers(made["logits"], made.get(TOP_LOGITS), made.get(TOP_IDS), largest)

    def _logits(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        if prod(shape[:-1]) > self._rows:
            return self._kind(dtype, shape)
        if self._all is None:
            self._all = self._kind(dtype, (self._rows, shape[-1]))
        return self._all.part(dtype, shape)


def sizes(spec: TensorSpec, dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else dims[d] for d in spec.shape)


class BoundCall:
    """`dims` are the sizes of the call. Inputs and outputs named in `inputs` and `outputs` lie at these addresses; the other inputs are
    the controls and get memory here, the other outputs are the logits and the largest of them, which get theirs from `logits`, and what an
    observer wants to see. A `repeated` call is worth recording, where the device can."""

    def __init__(
        self,
        session: Session,
        dims: Mapping[str, int],
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        logits: LogitsMemory,
        *,
        repeated: bool,
    ) -> None:
        self._call = session.call(repeated=repeated)
        B, self._T, self._slots = dims["B"], dims["T"], dims["S"]
        self.recorded = session.device == "cuda" and repeated
        changing = {spec.name: (spec.dtype, sizes(spec, dims)) for spec in session.spec.inputs if spec.name not in inputs}
        self._controls = Controls(session.device, changing, HOST_INPUTS)
        for spec in session.spec.inputs:
            address = inputs[spec.name] if spec.name in inputs else self._controls.buffers[spec.name].address
            self._call.input(spec.name, sizes(spec, dims), address)
        self.results, self._logits = logits.take(dims)
        """Those outputs by name, as buffers."""
        kind = BUFFERS[session.device]
        for spec in session.spec.outputs:
            if spec.name not in outputs and spec.name not in self.results:
                self.results[spec.name] = kind(spec.dtype, sizes(spec, dims))
            self._call.output(spec.name, sizes(spec, dims), outputs[spec.name] if spec.name in outputs else self.results[spec.name].address)
        if dims["N"]:
            # The last rows of each sequence, of the B*T rows of the call.
            ends = range(self._T, B * self._T + 1, self._T)
            self._controls.set("logit_rows", [row for end in ends for row in range(end - dims["N"] // B, end)])

    def run(self, ids: Sequence[int], lengths: Sequence[int], **controls: Sequence[int]) -> Rows:
        """`ids` [b,T] new tokens, sequence after sequence, `lengths` [b] tokens read before; `controls` are written where the graph has
        them. Returns the logits of b times `rows` rows, valid until the next run."""
        write = self._controls.set
        write("input_ids", ids)
        write("last_slot", [length + self._T - 1 for length in lengths])
        # A recorded step keeps the value it was recorded with: the number of slots is right for all of them.
        write("total_length", [self._slots if self.recorded else max(lengths) + self._T])
        for name, value in controls.items():
            write(name, value)
        self._controls.send()
        self._call.run()
        return self._logits.rows()
