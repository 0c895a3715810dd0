"""Attention caches of int8 and fp8 on CUDA: the op against attention over what its caches hold, and bundles beside one with fp16 caches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_export import build
from qwen_export.cache_formats import CACHE_FORMATS
from qwen_export.graphs.ops.cache_rows import CACHE_DTYPES, row_values, stored_rows
from qwen_export.graphs.ops.gated_attention_op import gated_attention
from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.decoding.read import Read
from tests.support.cuda_ops import LIMIT, Array, OneOp, error, rounded
from tests.support.longer_context import with_context
from tests.support.op_inputs import Attention, make_attention

pytestmark = pytest.mark.gpu
FORMATS = pytest.mark.parametrize("kept", ["int8", "fp8"])
DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
CONTEXT = 60_000
# Root mean square of what caches change in logits, in their deviations: measured on the CPU, 0.007 and 0.03.
CHANGE = {"int8": 0.05, "fp8": 0.2}


class Call:
    """One call with caches of bytes, and what they held before."""

    def __init__(self, given: Attention, dtype: str, kept: str) -> None:
        self.given, self.dtype, self.form = given, dtype, CACHE_FORMATS[kept]
        self.torch_dtype = CACHE_DTYPES[kept]
        self.values = {name: rounded(getattr(given, name), dtype) for name in ("q_gate", "k", "v", "q_norm", "k_norm")}
        self.norms = {name: rounded(1 + self.values[name], dtype) for name in ("q_norm", "k_norm")}
        self.tables = [rounded(turn(given.angles), dtype) for turn in (np.cos, np.sin)]
        self.rows = {name: self._bytes(getattr(given, name)) for name in ("k_cache", "v_cache")}

    def _bytes(self, values: Array) -> Array:
        """Rows of a cache as u8 [B,Hkv,S,W]; slots behind a text are full of ones, which is NaN or a large number."""
        rows = stored_rows(torch.from_numpy(np.nan_to_num(values).astype(np.float32)), self.torch_dtype).view(torch.uint8).numpy().copy()
        for b, length in enumerate(self.given.length):
            rows[b, :, length:] = 0xFF
        return rows

    def _values(self, rows: Array) -> Array:
        """f64[...,D] of rows."""
        D = self.given.k_cache.shape[3]
        return row_values(torch.from_numpy(rows.copy()).view(self.torch_dtype), D, torch.float64).numpy()

    def op(self, sequences: slice = slice(None), tokens: slice = slice(None), rows: dict[str, Array] | None = None) -> OneOp:
        given, (B, _, _), D = self.given, self.given.k.shape, self.given.k_cache.shape[3]
        query, gate = np.split(self.values["q_gate"].reshape(B, -1, given.heads, 2 * D), 2, axis=3)
        parts = [x.reshape(B, query.shape[1], -1) for x in (query, self.values["k"], self.values["v"], gate)]
        packed = np.concatenate(parts, axis=2)[sequences, tokens]
        inputs: dict[str, Any] = {"q": (packed, self.dtype), "k": None, "v": None, "gate": None}
        inputs |= {name: (value, self.dtype) for name, value in self.norms.items()}
        inputs |= {name: (table, self.dtype) for name, table in zip(("cos", "sin"), self.tables, strict=True)}
        inputs |= {name: ((rows or self.rows)[name][sequences], self.form.element.manifest) for name in ("k_cache", "v_cache")}
        inputs["length"] = (np.array(given.length[sequences]) + (tokens.start or 0), "int64")
        shape, kind = inputs["k_cache"][0].shape, self.form.element.manifest
        y = (*packed.shape[:2], given.heads * D)
        outputs = {"y": (y, self.dtype), "k_out": (shape, kind), "v_out": (shape, kind)}
        op = OneOp(
            "GatedAttention",
            self.dtype,
            inputs,
            outputs,
            scale=D**-0.5,
            epsilon=1e-6,
            num_heads=given.heads,
            kv_num_heads=given.kv_heads,
        )
        op.bind_outputs(k_out=op.inputs["k_cache"], v_out=op.inputs["v_cache"])
        return op

    def run(self, *arguments: Any, **named: Any) -> tuple[Array, dict[str, Array]]:
        """y in fp32, and the caches after it as bytes."""
        op = self.op(*arguments, **named)
        for name in ("k_out", "v_out"):  # the harness decodes results of types that numpy has
            op.outputs.pop(name)
        y = op.run(poison=False)["y"]
        return y, {name: op.inputs[name].read().reshape(op.inputs[name].shape) for name in ("k_cache", "v_cache")}

    def check(self, y: Array, after: dict[str, Array]) -> None:
        """New rows are what the format makes of keys and values, up to a step where the last bit of those differs; old rows and slots
        behind the text are as they were; y is attention over the rows that are there."""
        given, T = self.given, self.given.k.shape[1]
        arguments: list[Any] = [torch.from_numpy(self.values[name]) for name in ("q_gate", "k", "v")]
        arguments += [torch.from_numpy(self.norms[name] - 1) for name in self.norms] + [torch.from_numpy(table) for table in self.tables]
        exact = [np.nan_to_num(getattr(given, name)) for name in ("k_cache", "v_cache")]
        others = (torch.tensor(given.length), given.heads, given.kv_heads, 1e-6)
        _, *unrounded = (x.numpy() for x in gated_attention(*arguments, *map(torch.from_numpy, exact), *others))
        for name, whole in zip(("k_cache", "v_cache"), unrounded, strict=True):
            for b, length in enumerate(given.length):
                new = slice(length, length + T)
                assert np.array_equal(after[name][b, :, :length], self.rows[name][b, :, :length])
                assert (after[name][b, :, length + T :] == 0xFF).all()
                got, wanted = self._values(after[name][b, :, new]), whole[b, :, new]
                step = np.abs(wanted).max(-1, keepdims=True) / 100 if self.form.name == "int8" else np.abs(wanted) / 12 + 2**-9
                assert (np.abs(got - wanted) <= step).all(), name
        # The op's own rows as the past of a call without caches of bytes: queries see exactly what is stored.
        G, D = given.heads // given.kv_heads, given.k_cache.shape[3]
        q = torch.from_numpy(self.values["q_gate"].reshape(*given.k.shape[:2], given.heads, 2 * D))
        for b, length in enumerate(given.length):
            keys, values = (self._values(after[name][b, :, : length + T]).repeat(G, 0) for name in ("k_cache", "v_cache"))
            query = self._turned_queries(q[b], length)
            scores = np.einsum("thd,hsd->hts", query, keys) * D**-0.5
            scores[:, np.triu(np.ones((T, length + T), bool), length + 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            o = np.einsum("hts,hsd->thd", weights / weights.sum(-1, keepdims=True), values)
            wanted = o / (1 + np.exp(-q[b, :, :, D:].numpy()))
            assert error(y[b].reshape(wanted.shape), wanted) < 2 * LIMIT[self.dtype]

    def _turned_queries(self, q_gate: torch.Tensor, length: int) -> Array:
        """Norm and rotation of queries, by the op itself: as keys of as many heads."""
        T, heads, double = q_gate.shape
        D = double // 2
        S = length + T
        cache = torch.zeros(1, heads, S, D, dtype=torch.float64)
        norm = torch.from_numpy(self.norms["q_norm"] - 1)
        flat = q_gate.reshape(1, T, -1)
        keys = q_gate[:, :, :D].reshape(1, T, -1)
        tables = [torch.from_numpy(table) for table in self.tables]
        _, turned, _ = gated_attention(flat, keys, keys, norm, norm, *tables, cache, cache, torch.tensor([length]), heads, heads, 1e-6)
        return turned[0, :, length:].transpose(0, 1).numpy()


@FORMATS
@DTYPES
@pytest.mark.parametrize(("ratio", "kv_heads", "D"), [(4, 2, 256), (6, 4, 256), (16, 1, 256), (4, 1, 64)])
@pytest.mark.parametrize("T", [1, 2, 5, 17, 200])
def test_ragged_calls(kept: str, dtype: str, ratio: int, kv_heads: int, D: int, T: int) -> None:
    call = Call(make_attention(ratio, kv_heads=kv_heads, lengths=(0, 3, 255, 300, 700), T=T, S=960, D=D, R=D // 4), dtype, kept)
    call.check(*call.run())


@FORMATS
def test_many_chunks_of_a_long_past(kept: str) -> None:
    call = Call(make_attention(4, kv_heads=2, lengths=(9000,), T=3, S=9100, D=256, R=64), "float16", kept)
    call.check(*call.run())


@FORMATS
def test_a_token_has_the_same_rows_whichever_call_reads_it(kept: str) -> None:
    """A prompt, drafts and steps leave the same bytes."""
    given = make_attention(4, kv_heads=2, lengths=(130, 640), T=150, S=900, D=256, R=64)
    call = Call(given, "float16", kept)
    _, whole = call.run()
    for size in (1, 4, 50):
        rows = call.rows
        for start in range(0, 150, size):
            _, rows = call.run(tokens=slice(start, start + size), rows=rows)
        for name in rows:
            assert np.array_equal(rows[name], whole[name]), (size, name)


@FORMATS
def test_a_sequence_gives_the_same_bits_alone(kept: str) -> None:
    for T in (1, 4, 150):
        call = Call(make_attention(4, kv_heads=2, lengths=(1, 130, 2000, 640), T=T, S=2200, D=256, R=64), "float16", kept)
        together, _ = call.run()
        for b in range(4):
            assert np.array_equal(call.run(slice(b, b + 1))[0], together[b : b + 1])


@pytest.fixture(scope="module")
def bundles(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("caches")
    checkpoint = with_context(demo_checkpoint, CONTEXT, directory / "checkpoint")
    return {
        name: build(checkpoint, directory / name, device="cuda", precision="fp16", cache_precision=name, max_context=CONTEXT)
        for name in ("fp16", "int8", "fp8")
    }


@pytest.fixture
def models(bundles: dict[str, Path], kept: str) -> Iterator[tuple[Model, Model]]:
    with load(bundles[kept], speculate=4) as ours, load(bundles["fp16"], speculate=4) as plain:
        yield ours, plain


def text(count: int) -> list[int]:
    return np.random.default_rng(0).integers(0, 4000, count).tolist()


@FORMATS
def test_logits_are_near_those_of_wide_caches(models: tuple[Model, Model], kept: str) -> None:
    ours, plain = (model.decoder() for model in models)
    ids = text(600)
    got, wanted = (np.array(decoder.read(ids)) for decoder in (ours, plain))
    assert np.sqrt(((got - wanted) ** 2).mean()) < CHANGE[kept] * wanted.std()
    # In steps, and as drafts of which some are kept, the logits are those of the prompt.
    decoder = models[0].decoder()
    decoder.prefill(ids[:580])
    steps = [np.array(decoder.step([token])[0]) for token in ids[580:588]]
    # Prompts and steps round in other places, and a value beside the border of two codes becomes the other one.
    np.testing.assert_allclose(np.stack(steps), got[580:588], atol=0.1)
    [rows] = decoder.run([Read(0, ids[588:592], commit=False, logits=4)])
    np.testing.assert_allclose(rows.array[:4], got[588:592], atol=0.1)
    decoder.accept(2)
    np.testing.assert_allclose(decoder.step([ids[590]])[0], got[590], atol=0.1)


@FORMATS
def test_batches_snapshots_and_caches_that_grow(models: tuple[Model, Model], kept: str) -> None:
    """Sequences across the ends of pages give what one alone gives; a snapshot goes through the host and comes back."""
    model, _ = models
    ids = text(40_000)  # a page of int8 has 26214 rows of this model
    together, alone = model.decoder(3, drafts=True), model.decoder()
    held = together.held_bytes(1)
    together.prefill(ids[:100], 0)
    together.prefill(ids, 1)
    together.prefill(ids[:300], 2)
    assert together.held_bytes(1) > held == together.held_bytes(0)
    alone.prefill(ids)
    for token in range(6):
        got, wanted = together.step([token, token, token])[1].copy(), alone.step([token])[0].copy()
        np.testing.assert_allclose(got, wanted, atol=0.06)
    snapshot = together.snapshot(1)
    expected = together.step([1, 7, 1])[1].copy()
    together.reset(2)
    together.restore(snapshot, 2)
    np.testing.assert_allclose(together.step([1, 1, 7])[2], expected, atol=0.06)


@FORMATS
def test_texts_with_drafts_are_those_without(bundles: dict[str, Path], kept: str) -> None:
    texts = []
    for drafts in ("off", 3):
        with load(bundles[kept], speculate=drafts) as model:
            answer = model.complete("def main() -> None:\n", sampling=SamplingParams(greedy=True), max_new_tokens=96)
            texts.append("".join(answer))
    assert texts[0] == texts[1] != ""
