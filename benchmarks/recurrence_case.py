"""The gated delta rule as one engine: inputs as the convolution gives them, and a comparison with float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from benchmarks.engine_piece import FLOAT, Case
from qwen_export.plugins.decompose.delta_rule import DeltaRule, Recurrence, delta_rule
from qwen_export.plugins.emitter import Emitter

HK, HV, D = 16, 32, 128


def recurrence_inputs(T: int) -> dict[str, tuple[tuple[int, ...], ir.DataType]]:
    """As they come from the convolution: token after token."""
    return {
        "q": ((1, T, HK * D), FLOAT),
        "k": ((1, T, HK * D), FLOAT),
        "v": ((1, T, HV * D), FLOAT),
        "g": ((1, T, HV), FLOAT),
        "beta": ((1, T, HV), FLOAT),
        "state": ((1, HV, D, D), FLOAT),
    }


def recurrence_values(T: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    common = torch.randn(1, 1, HK, D, generator=generator)

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    k = unit(unit(common) * 0.7 + unit(torch.randn(1, T, HK, D, generator=generator)) * 0.7)
    q = unit(torch.randn(1, T, HK, D, generator=generator)) * D**-0.5
    return {
        "q": q.reshape(1, T, HK * D),
        "k": k.reshape(1, T, HK * D),
        "v": torch.randn(1, T, HV * D, generator=generator),
        "g": -torch.empty(1, T, HV).exponential_(10.0, generator=generator),
        "beta": torch.rand(1, T, HV, generator=generator) * 0.5 + 0.5,
        "state": torch.zeros(1, HV, D, D),
    }


def heads_first(emit: Emitter, x: dict[str, ir.Value], T: int) -> Recurrence:
    index = emit.array("key_head", np.repeat(np.arange(HK, dtype=np.int32), HV // HK))
    q, k = (emit.gather(emit.transpose(emit.reshape(x[n], 1, T, HK, D), 0, 2, 1, 3), index, axis=1) for n in ("q", "k"))
    v = emit.transpose(emit.reshape(x["v"], 1, T, HV, D), 0, 2, 1, 3)
    g, beta = (emit.reshape(emit.transpose(x[n], 0, 2, 1), 1, HV, T, 1) for n in ("g", "beta"))
    return Recurrence(q, k, v, g, beta, x["state"], T)


def against_float64(given: dict[str, torch.Tensor], outputs: list[torch.Tensor]) -> str:
    """Largest error of outputs and state, relative to the largest entry."""
    T = given["v"].shape[1]
    x = {name: tensor.double() for name, tensor in given.items()}
    q, k = (x[n].reshape(T, HK, D).repeat_interleave(HV // HK, 1) for n in ("q", "k"))
    v, g, beta, S = x["v"].reshape(T, HV, D), x["g"][0].exp(), x["beta"][0], x["state"][0].clone()
    o = torch.empty_like(v)
    for t in range(T):
        S = S * g[t, :, None, None]
        u = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))
        S = S + k[t][:, :, None] * u[:, None]
        o[t] = torch.einsum("hkv,hk->hv", S, q[t])
    got = outputs[0].double().reshape(HV, T, D).transpose(0, 1)
    errors = (got - o).abs().max() / o.abs().max(), (outputs[1][0].double() - S).abs().max() / S.abs().max()
    return f"error of o {errors[0]:.1e}, of the state {errors[1]:.1e}"


def recurrence(name: str, rule: DeltaRule, T: int, tf32: bool = False, emitter: type[Emitter] = Emitter) -> Case:
    def body(emit: Emitter, x: dict[str, ir.Value]) -> Sequence[ir.Value]:
        return rule(emit, heads_first(emit, x, T))

    return Case(name, recurrence_inputs(T), body, tf32, check=against_float64, values=recurrence_values(T), emitter=emitter)


def one_after_the_other(size: int) -> DeltaRule:
    """`delta_rule` over `size` tokens at a time, nothing of one chunk together with another's."""

    def rule(emit: Emitter, given: Recurrence) -> tuple[ir.Value, ir.Value]:
        state, outputs = given.state, []
        for start in range(0, given.length, size):
            o, state = delta_rule(emit, given.part(emit, start, min(start + size, given.length), state))
            outputs.append(o)
        return emit.concat(outputs, axis=2), state

    return rule
