"""qwen::place_features, what the tower made of a picture instead of the embeddings of its placeholder tokens.

y = x, but row places[k] of its B*T rows is features[k]
"""

from __future__ import annotations

from torch import Tensor

from qwen_export.graphs.ops.op_schema import define


def _body(x: Tensor, features: Tensor, places: Tensor) -> Tensor:
    """x [B,T,H]  features [K,H]  places i64[K], rows of B*T, each once -> y [B,T,H]. K may be 0."""
    rows = x.reshape(-1, x.shape[-1]).clone()
    rows[places] = features.to(rows.dtype)
    return rows.reshape(x.shape)


def _fake(x: Tensor, features: Tensor, places: Tensor) -> Tensor:
    return x.new_empty(x.shape)


place_features = define("place_features", ("y",), _body, _fake)
