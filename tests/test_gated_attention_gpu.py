"""GatedAttention of the CUDA plugin against the op's eager body in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qwen_export.graphs.ops.gated_attention_op import gated_attention
from qwen_export.runtimes.memory.buffers import as_bytes
from tests.support.cuda_ops import LIMIT, Array, OneOp, error, rounded
from tests.support.op_inputs import Attention, make_attention

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
HEADS = pytest.mark.parametrize(
    ("ratio", "kv_heads", "D"), [(4, 2, 256), (8, 2, 256), (6, 4, 256), (16, 1, 256), (2, 2, 128), (4, 1, 64), (1, 3, 32)]
)
NAMES = ("q_gate", "k", "v", "q_norm", "k_norm", "k_cache", "v_cache")


class Call:
    """One call as the device sees it, and as the eager body does: the same values, the norms with their offset folded in."""

    def __init__(self, given: Attention, dtype: str, *, own_tables: bool = False) -> None:
        self.given, self.dtype = given, dtype
        values = {name: rounded(getattr(given, name), dtype) for name in NAMES}
        norms = {name: rounded(1 + values[name], dtype) for name in ("q_norm", "k_norm")}
        self.tables = [rounded(turn(given.angles), dtype) for turn in (np.cos, np.sin)]
        arguments: list[Any] = [torch.from_numpy(values[name]) for name in ("q_gate", "k", "v")]
        arguments += [torch.from_numpy(norms[name] - 1) for name in norms] + [torch.from_numpy(table) for table in self.tables]
        arguments += [torch.from_numpy(values[name]) for name in ("k_cache", "v_cache")] + [torch.tensor(given.length)]
        self.expected = [x.numpy() for x in gated_attention(*arguments, given.heads, given.kv_heads, 1e-6)]
        (B, T, _), D = given.k.shape, given.k_cache.shape[3]
        query, gate = np.split(values["q_gate"].reshape(B, T, given.heads, 2 * D), 2, axis=3)
        self.query, self.gate = query.reshape(B, T, -1), gate.reshape(B, T, -1)
        self.values, self.norms = values, norms
        if own_tables:
            self.tables = [np.broadcast_to(table, (B, *table.shape)) for table in self.tables]

    def op(self, sequences: slice = slice(None), *, packed: bool = True) -> OneOp:
        """Caches are written in place."""
        parts = {"q": self.query, "k": self.values["k"], "v": self.values["v"], "gate": self.gate}
        parts = {name: value[sequences] for name, value in parts.items()}
        inputs: dict[str, Any] = {name: (value, self.dtype) for name, value in parts.items()}
        if packed:
            inputs = {"q": (np.concatenate(list(parts.values()), axis=2), self.dtype), "k": None, "v": None, "gate": None}
        inputs |= {name: (value, self.dtype) for name, value in self.norms.items()}
        inputs |= {
            name: (table if table.ndim == 2 else table[sequences], self.dtype)
            for name, table in zip(("cos", "sin"), self.tables, strict=True)
        }
        inputs |= {name: (self.values[name][sequences], self.dtype) for name in ("k_cache", "v_cache")}
        inputs["length"] = (np.array(self.given.length[sequences]), "int64")
        cache = inputs["k_cache"][0].shape
        outputs = {"y": (parts["q"].shape, self.dtype), "k_out": (cache, self.dtype), "v_out": (cache, self.dtype)}
        counts = {"num_heads": self.given.heads, "kv_num_heads": self.given.kv_heads}
        op = OneOp("GatedAttention", self.dtype, inputs, outputs, scale=cache[3] ** -0.5, epsilon=1e-6, **counts)
        op.bind_outputs(k_out=op.inputs["k_cache"], v_out=op.inputs["v_cache"])
        return op

    def check(self, got: dict[str, Array]) -> None:
        """Slots behind a sequence's tokens hold NaN before and after: they are neither read nor written."""
        assert error(got["y"], self.expected[0]) < 2 * LIMIT[self.dtype]
        T = self.given.k.shape[1]
        for name, expected in zip(("k_out", "v_out"), self.expected[1:], strict=True):
            for b, length in enumerate(self.given.length):
                assert np.array_equal(got[name][b, :, :length], expected[b, :, :length])
                assert error(got[name][b, :, length : length + T], expected[b, :, length : length + T]) < LIMIT[self.dtype]
                assert np.isnan(got[name][b, :, length + T :]).all()


@DTYPES
@HEADS
@pytest.mark.parametrize("T", [1, 2, 5, 16, 17, 200])
def test_ragged_calls(dtype: str, ratio: int, kv_heads: int, D: int, T: int) -> None:
    given = make_attention(ratio, kv_heads=kv_heads, lengths=(0, 3, 255, 300, 700), T=T, S=960, D=D, R=D // 4)
    call = Call(given, dtype, own_tables=T % 2 == 0)
    for packed in (True, False):
        call.check(call.op(packed=packed).run(poison=False))


@DTYPES
def test_many_chunks_of_a_long_past(dtype: str) -> None:
    given = make_attention(4, kv_heads=2, lengths=(9000,), T=3, S=9100, D=256, R=64)
    call = Call(given, dtype)
    call.check(call.op().run(poison=False))


@DTYPES
@pytest.mark.parametrize("T", [1, 4, 150])
def test_a_sequence_gives_the_same_bits_alone(dtype: str, T: int) -> None:
    given = make_attention(4, kv_heads=2, lengths=(1, 130, 2000, 1021), T=T, S=2200, D=256, R=64)
    call = Call(given, dtype)
    together = call.op().run(poison=False)["y"]
    for b in range(4):
        assert np.array_equal(call.op(slice(b, b + 1)).run(poison=False)["y"], together[b : b + 1])


@pytest.mark.parametrize("T", [3, 7])
def test_a_sequence_gives_the_same_bits_beside_many(T: int) -> None:
    """Alone there are processors enough for blocks of eight rows, beside many others there are not."""
    given = make_attention(4, kv_heads=4, lengths=(1, 130, 600) * 10, T=T, S=640, D=256, R=64)
    call = Call(given, "bfloat16")
    together = call.op().run(poison=False)["y"]
    for b in range(3):
        assert np.array_equal(call.op(slice(b, b + 1)).run(poison=False)["y"], together[b : b + 1])


def test_a_recorded_step_serves_every_length() -> None:
    """The lengths are data: a replay reads those of its time."""
    given = make_attention(4, kv_heads=2, lengths=(3, 700), T=1, S=800, D=256, R=64)
    call = Call(given, "bfloat16")
    op = call.op()
    for got in op.replays(poison=False):
        call.check(got)
    given.length = [1, 320]
    op.inputs["length"].write(as_bytes(np.array(given.length)))
    fresh = Call(given, "bfloat16")
    got = op.run(recorded=True, poison=False)["y"]
    assert error(got, fresh.expected[0]) < 2 * LIMIT["bfloat16"]


def test_caches_of_their_own_memory_are_copied() -> None:
    given = make_attention(4, kv_heads=2, lengths=(5,), T=2, S=64, D=256, R=64)
    call = Call(given, "float16")
    op = call.op()
    fresh = {name: type(op.inputs["k_cache"])("float16", given.k_cache.shape) for name in ("k_out", "v_out")}
    op.bind_outputs(**fresh)
    call.check(op.run())
