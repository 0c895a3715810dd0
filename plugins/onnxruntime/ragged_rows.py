"""Which rows a call with pending tokens reads, sequence by sequence, for kernels that take rectangles [B,tokens,...] only.

Sequence b reads pending[:accepted_b] and then its T new tokens, of which commit_b enter its state. The rectangle is aligned at the new
tokens, with A = max(accepted) columns before them:

    columns     0 .. A-accepted_b-1      fill: some row of the same sequence, which must not enter the state
                A-accepted_b .. A-1      pending[:accepted_b]
                A .. A+T-1               new

A state is updated in two passes, because a kernel returns the state after its last token only. The first pass reads columns 0 .. A+n-1,
n = max(commit), and leaves the state of the call; the second starts from there, and its state is dropped. It reads columns A+m .. A+T-1:
m = n if every sequence commits tokens, else 0, because a sequence that commits none has its outputs from the second pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qwen_export.plugins.emitter import Emitter

_END = 2**62


@dataclass(frozen=True)
class RaggedRows:
    """Index vectors of one call, i64; `first` and `again` are of the two passes. The same for all layers."""

    pending_end: ir.Value
    """[1]: A."""
    history: ir.Value
    """[B,K-1,1]: what the convolution reads before column 0, in history | pending[:A] | new."""
    columns: ir.Value
    """[B,A+T,1]: the columns, in history | pending[:A] | new."""
    next_history: ir.Value
    """[B,K-1,1]: the history after the call, in history | pending[:A] | new."""
    gates: ir.Value
    """[B,A+n+T-m,1]: the columns of both passes, in pending[:A] | new."""
    enters: ir.Value
    """bool[B,A+n+T-m,1]: whether a token of these may change the state. Always true in the second pass."""
    lengths: ir.Value
    """[2]: columns of each pass, A+n and T-m."""
    first_end: ir.Value
    """[1]: A+n."""
    again_start: ir.Value
    """[1]: A+m."""
    results: ir.Value
    """[B,T,1]: outputs of the new tokens, in outputs of the first pass | outputs of the second."""

    @classmethod
    def emit(cls, emit: Emitter, new: ir.Value, accepted: ir.Value, commit: ir.Value, taps: int) -> RaggedRows:
        """`new` [B,T,...] are the new tokens, accepted and commit i64[B], `taps` is K-1."""

        def compare(op: str, a: ir.Value, b: ir.Value) -> ir.Value:
            return emit("", op, [a, b], dtype=ir.DataType.BOOL)[0]

        def where(condition: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
            return emit("", "Where", [condition, a, b], like=a)[0]

        def count(end: ir.Value) -> ir.Value:
            """[rows,1]: 0 .. end-1 for end [1]."""
            (scalar,) = emit("", "Squeeze", [end], like=end)
            (numbers,) = emit("", "Range", [emit.integer(0), scalar, emit.integer(1)], like=end)
            return emit("", "Unsqueeze", [numbers, emit.ints(1)], like=numbers)[0]

        zero = emit.ints(0)
        (T,) = emit("", "Shape", [new], dtype=ir.DataType.INT64, start=1, end=2)
        (A,) = emit("", "ReduceMax", [accepted, zero], like=accepted, keepdims=1)
        (n,) = emit("", "ReduceMax", [commit, zero], like=commit, keepdims=1)
        (least,) = emit("", "ReduceMin", [commit, zero], like=commit, keepdims=1)
        m = where(compare("Greater", least, zero), n, zero)
        commits = emit.reshape(commit, -1, 1, 1)
        fill = emit.reshape(emit.sub(A, accepted), -1, 1, 1)

        def source(row: ir.Value, first_new: ir.Value) -> ir.Value:
            """Where a row is stored: those before the new tokens are `fill` rows earlier, and the fill itself is row 0."""
            (moved,) = emit("", "Max", [emit.sub(row, fill), zero], like=row)
            return where(compare("Less", row, first_new), moved, row)

        before = emit.add(A, emit.ints(taps))
        window = source(count(emit.add(before, T)), before)
        history, columns = emit("", "Split", [window, emit.concat([emit.ints(taps), emit.add(A, T)], 0)], 2, like=window, axis=1)
        end = emit.add(commits, A)

        first_end, again_start = emit.add(A, n), emit.add(A, m)
        lengths = emit.concat([first_end, emit.sub(T, m)], 0)
        (total,) = emit("", "ReduceSum", [lengths, zero], like=lengths, keepdims=1)
        order = count(total)
        in_first = compare("Less", order, first_end)
        column = where(in_first, order, emit.add(order, emit.sub(m, n)))
        limit = where(in_first, end, emit.ints(_END))
        (enters,) = emit("", "And", [compare("GreaterOrEqual", column, fill), compare("Less", column, limit)], dtype=ir.DataType.BOOL)
        shift = emit.add(where(compare("Equal", commits, zero), n, zero), A)
        return cls(
            pending_end=A,
            history=history,
            columns=columns,
            next_history=source(emit.add(end, count(emit.ints(taps))), before),
            gates=source(column, A),
            enters=enters,
            lengths=lengths,
            first_end=first_end,
            again_start=again_start,
            results=emit.add(shift, count(T)),
        )

    def pending(self, emit: Emitter, x: ir.Value | None) -> ir.Value:
        """x[:, :A]."""
        return emit("", "Slice", [x, emit.ints(0), self.pending_end, emit.ints(1)], like=x)[0]

    def both(self, emit: Emitter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The columns of x that each pass reads."""
        axis = emit.ints(1)
        (first,) = emit("", "Slice", [x, emit.ints(0), self.first_end, axis], like=x)
        (again,) = emit("", "Slice", [x, self.again_start, emit.ints(_END), axis], like=x)
        return first, again


def gather_rows(emit: Emitter, x: ir.Value, rows: ir.Value) -> ir.Value:
    """x[b, rows[b, i]]: x [B,R,...], rows [B,n,1]."""
    return emit("", "GatherND", [x, rows], like=x, batch_dims=1)[0]
