"""gated_delta_net as standard operators: one sequence, T new tokens, P pending ones.

The transaction costs no second pass. Pending tokens that were not accepted are identity transitions (beta = 0, g = 0); new tokens at and
behind `commit` get their outputs but do not enter the state. So a verify, a plain step and the padded tail of a prompt are one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.ops.gated_delta_net_op import L2_EPS
from qwen_export.graphs.weights.expression import Column, NegativeExp, Reshaped, StoredWeight, Weight, add_weight, weight_of
from qwen_export.plugins.decompose.delta_rule import DeltaRule, Recurrence, delta_rule
from qwen_export.plugins.emitter import Emitter


@dataclass(frozen=True)
class DeltaNetSizes:
    """Static sizes of one call: T new and P pending tokens, and the heads."""

    T: int
    P: int
    Hk: int
    Hv: int
    Dk: int
    Dv: int
    K: int

    @classmethod
    def of(cls, config: TextConfig, T: int, P: int) -> DeltaNetSizes:
        return cls(
            T,
            P,
            config.linear_num_key_heads,
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
            config.linear_conv_kernel_dim,
        )


Convolution = Callable[[Emitter, dict[str, ir.Value | None], DeltaNetSizes], tuple[ir.Value, ir.Value, ir.Value, ir.Value]]
"""What the recurrence reads, q, k [1,Hv,L,Dk] and v [1,Hv,L,Dv], and the convolution's history afterwards."""


def emit_gated_delta_net(
    emit: Emitter,
    given: dict[str, ir.Value | None],
    sizes: DeltaNetSizes,
    eps: float,
    activation: ir.DataType,
    rule: DeltaRule = delta_rule,
    convolve: Convolution | None = None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """`given` are the inputs of qwen::gated_delta_net by name, for one sequence; `accepted` and `commit` as i32[1], absent (with P = 0)
    where nothing is pending and every call commits all its tokens. `rule` computes the recurrence, `convolve` what it reads. Returns y,
    conv_history' and state'."""
    T, P, Hv = sizes.T, sizes.P, sizes.Hv
    accepted, commit = given.get("accepted"), given.get("commit")
    a, b = emit.wide(given["a"]), emit.wide(given["b"])
    if P:
        a = emit.concat([emit.wide(given["pending_a"]), a], axis=1)
        b = emit.concat([emit.wide(given["pending_b"]), b], axis=1)
    q, k, v, history_after = (convolve or shifted_products)(emit, given, sizes)
    g, beta = _gates(emit, given, a, b, sizes)
    live, keep = _masks(emit, accepted, commit, sizes)
    if live is not None:
        g, beta = emit.mul(g, live), emit.mul(beta, live)
    state = given["state"]
    if state is None:
        raise TypeError("gated_delta_net has no state")
    o, state_after = rule(emit, Recurrence(q, k, v, g, beta, state, P + T, keep))
    if P:
        o = emit.rows(o, P, P + T, axis=2)
    y = _gated_norm(emit, emit.reshape(emit.transpose(o, 0, 2, 1, 3), 1, T, Hv, sizes.Dv), given, sizes, eps)
    return emit.cast(y, activation), history_after, state_after


def fp32_weight(emit: Emitter, value: ir.Value | None) -> ir.Value:
    """The checkpoint's values of a vector in fp32, without a detour through the build's precision."""
    weight = weight_of(value)
    if value is None or not isinstance(weight, StoredWeight):
        raise TypeError("a vector of an op is not a stored tensor")
    return value if weight.dtype == ir.DataType.FLOAT else add_weight(emit.graph, f"{value.name}.fp32", as_fp32(weight))


def as_fp32(weight: Weight) -> Weight:
    """The same expression over stored tensors that are read as fp32."""
    if isinstance(weight, StoredWeight):
        return replace(weight, dtype=ir.DataType.FLOAT)
    if isinstance(weight, Reshaped):
        return Reshaped(as_fp32(weight.of), weight.shape)
    raise TypeError(f"no fp32 form of {type(weight).__name__}")


def _taps(emit: Emitter, given: dict[str, ir.Value | None], K: int) -> list[ir.Value]:
    """The convolution's weight as K vectors f32[C]."""
    value = given["conv_weight"]
    weight = weight_of(value)
    if value is None or weight is None:
        raise TypeError("the convolution has no stored weight")
    name = (value.name or "").removesuffix(".view")
    return [add_weight(emit.graph, f"{name}.tap{i}", Column(as_fp32(weight), i)) for i in range(K)]


def shifted_products(
    emit: Emitter, given: dict[str, ir.Value | None], sizes: DeltaNetSizes
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """The Convolution of any target, over rows of tokens."""
    T, P, K = sizes.T, sizes.P, sizes.K
    taps, inputs, history = _taps(emit, given, K), [], given["conv_history"]
    accepted, commit = given.get("accepted"), given.get("commit")
    if P:
        before = emit.concat([history, given["pending_qkv"]], axis=1)
        inputs.append(_conv_silu(emit, emit.wide(before), taps, P))
        history = emit.gather(before, emit.shared("history_rows", lambda: emit.add(emit.positions(K - 1), accepted)), axis=1)
    rows = emit.concat([history, given["qkv"]], axis=1)
    inputs.append(_conv_silu(emit, emit.wide(rows), taps, T))
    history_after = last_inputs(emit, rows, commit, sizes, axis=1)
    return *_heads(emit, inputs[0] if len(inputs) == 1 else emit.concat(inputs, axis=1), sizes), history_after


def last_inputs(emit: Emitter, rows: ir.Value, commit: ir.Value | None, sizes: DeltaNetSizes, axis: int) -> ir.Value:
    """The K - 1 inputs of the convolution before the first token that is not committed, of K - 1 + T along `axis`."""
    if commit is None:
        return emit.rows(rows, sizes.T, sizes.T + sizes.K - 1, axis=axis)
    return emit.gather(rows, emit.shared("history_after_rows", lambda: emit.add(emit.positions(sizes.K - 1), commit)), axis=axis)


def _conv_silu(emit: Emitter, rows: ir.Value, taps: list[ir.Value], count: int) -> ir.Value:
    """Causal depthwise convolution and SiLU: rows f32[1,K-1+count,C] -> f32[1,count,C]. Shifted products: no transpose, no grouped Conv,
    which several runtimes compute channel by channel."""
    total: ir.Value | None = None
    for i, tap in enumerate(taps):
        part = emit.mul(emit.rows(rows, i, i + count, axis=1), tap)
        total = part if total is None else emit.add(total, part)
    if total is None:
        raise TypeError("a convolution without taps")
    return emit.mul(total, emit.sigmoid(total))


def _heads(emit: Emitter, u: ir.Value, sizes: DeltaNetSizes) -> tuple[ir.Value, ir.Value, ir.Value]:
    """u f32[1,L,C] -> q, k [1,Hv,L,Dk] normalized, q scaled, both repeated for the value heads, and v [1,Hv,L,Dv]."""
    Hk, Hv, Dk, Dv = sizes.Hk, sizes.Hv, sizes.Dk, sizes.Dv
    L = sizes.P + sizes.T
    qk, v = emit.split(u, [2 * Hk * Dk, Hv * Dv], axis=2)
    q, k = unit_heads(emit, emit.transpose(emit.reshape(qk, 1, L, 2 * Hk, Dk), 0, 2, 1, 3), sizes)
    return q, k, emit.transpose(emit.reshape(v, 1, L, Hv, Dv), 0, 2, 1, 3)


def unit_heads(emit: Emitter, qk: ir.Value, sizes: DeltaNetSizes) -> tuple[ir.Value, ir.Value]:
    """f32[1,2Hk,L,Dk], queries and then keys -> q, k [1,Hv,L,Dk]."""
    Hk, Hv, Dk = sizes.Hk, sizes.Hv, sizes.Dk
    scale = np.repeat(np.array([Dk**-0.5, 1], np.float32), Hk).reshape(1, 2 * Hk, 1, 1)
    q, k = emit.split(emit.unit_scale(qk, Dk, emit.array(f"qk_scale_{Hk}_{Dk}", scale), L2_EPS), [Hk, Hk], axis=1)
    if Hv != Hk:
        index = emit.array(f"key_head_{Hk}_{Hv}", np.repeat(np.arange(Hk, dtype=np.int32), Hv // Hk))
        q, k = emit.gather(q, index, axis=1), emit.gather(k, index, axis=1)
    return q, k


def _gates(emit: Emitter, given: dict[str, ir.Value | None], a: ir.Value, b: ir.Value, sizes: DeltaNetSizes) -> tuple[ir.Value, ir.Value]:
    """a, b f32[1,L,Hv] -> g and beta f32[1,Hv,L,1]."""
    value = given["a_log"]
    weight = weight_of(value)
    if value is None or not isinstance(weight, StoredWeight):
        raise TypeError("A_log is not a stored tensor")
    decay = add_weight(emit.graph, f"{value.name}.decay", NegativeExp(weight))
    (soft,) = emit("", "Softplus", [emit.add(a, given["dt_bias"])], like=a)

    def per_head(x: ir.Value) -> ir.Value:
        return emit.reshape(emit.transpose(x, 0, 2, 1), 1, sizes.Hv, sizes.P + sizes.T, 1)

    return per_head(emit.mul(soft, decay)), per_head(emit.sigmoid(b))


def _masks(
    emit: Emitter, accepted: ir.Value | None, commit: ir.Value | None, sizes: DeltaNetSizes
) -> tuple[ir.Value | None, ir.Value | None]:
    """f32[1,1,P+T,1]: `live` is 0 for pending tokens that were not accepted, `keep` also for new tokens that are not committed. None where
    all are 1. The same for every layer: made by the first, shared by the rest."""
    T, P = sizes.T, sizes.P
    new = emit.shared(f"committed_{T}", lambda: _first(emit, commit, T)) if commit is not None else None
    if not P:
        return None, new
    old = emit.shared(f"accepted_{P}", lambda: _first(emit, accepted, P))
    ones = emit.array(f"ones_{T}", np.ones((1, 1, T, 1), np.float32))
    live = emit.shared(f"live_{P}_{T}", lambda: emit.concat([old, ones], axis=2))
    keep = emit.shared(f"keep_{P}_{T}", lambda: emit.concat([old, new if new is not None else ones], axis=2))
    return live, keep


def _first(emit: Emitter, count: ir.Value | None, size: int) -> ir.Value:
    """f32[1,1,size,1]: 1 for the first `count` of them."""
    (inside,) = emit("", "Less", [emit.positions(size), count], dtype=ir.DataType.BOOL)
    return emit.reshape(emit.wide(inside), 1, 1, size, 1)


def _gated_norm(emit: Emitter, o: ir.Value, given: dict[str, ir.Value | None], sizes: DeltaNetSizes, eps: float) -> ir.Value:
    """o f32[1,T,Hv,Dv] -> f32[1,T,Hv*Dv]: RMS norm per head, times SiLU(z)."""
    normed = emit.rms_norm(o, fp32_weight(emit, given["norm"]), eps)
    z = emit.wide(given["z"])
    return emit.mul(emit.reshape(normed, 1, sizes.T, sizes.Hv * sizes.Dv), emit.mul(z, emit.sigmoid(z)))
