"""The eager decoder, layer by layer: what passes the points of `layer_points`, and the same with the stream of another model put in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qwen_export.cache_formats import CacheFormat
from qwen_export.graphs.layer_points import EMBEDDING, OUTPUT, READ_BY, point_name
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.text_model import TextModel

Floats = npt.NDArray[np.float32]


@dataclass
class Observation:
    """What one run over T tokens showed: `points` by name f32[T,W]; `logits` f32[T,V]; `routing_gap` per layer of a mixture f32[T], how far
    the last expert that a token gets is before the first that it does not get, in units of the token's largest router logit."""

    points: dict[str, Floats] = field(default_factory=dict)
    logits: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    routing_gap: dict[int, Floats] = field(default_factory=dict)


def observe(
    model: TextModel, ids: Sequence[int], streams: Mapping[str, Floats] | None = None, caches: CacheFormat | None = None
) -> Observation:
    """Read `ids` in one call. `streams` are residual streams of another model, by their points f32[T,hidden], rows without a value NaN:
    whatever reads a stream gets theirs instead of its own, so each layer starts from the same values as theirs, and differences
    between the models do not add up from layer to layer. `caches`: what attention caches keep of values."""
    seen, given = Observation(), streams or {}
    with _Hooks() as hooks:
        for i, layer in enumerate(model.layers):
            hooks.before(layer, _put(given.get(EMBEDDING if i == 0 else point_name(i - 1, OUTPUT))))
            for point, modules in READ_BY.items():
                hooks.before(_module(layer, modules), _keep(seen, point_name(i, point)))
            hooks.after(layer, _keep_first(seen, point_name(i, OUTPUT)))
            if model.config.is_moe:
                hooks.after(layer.get_submodule("mlp.gate"), _keep_gap(seen, i, model.config.num_experts_per_tok))
        hooks.before(model.norm, _put(given.get(point_name(len(model.layers) - 1, OUTPUT))))
        hooks.after(model.embed_tokens, _keep(seen, EMBEDDING))
        seen.logits = EagerSequence(model, len(ids), caches).read(ids)
    return seen


class _Hooks:
    """Hooks on modules for as long as the context lasts."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __enter__(self) -> _Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def before(self, module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> None:
        """`see` gets the first argument; what it returns, if anything, takes its place."""

        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            changed = see(arguments[0])
            return None if changed is None else (changed, *arguments[1:])

        self._handles.append(module.register_forward_pre_hook(hook))

    def after(self, module: nn.Module, see: Callable[[Any], None]) -> None:
        self._handles.append(module.register_forward_hook(lambda _module, _arguments, result: see(result)))


def _module(layer: nn.Module, names: Sequence[str]) -> nn.Module:
    known = dict(layer.named_modules())
    return next(known[name] for name in names if name in known)


def _keep(seen: Observation, name: str) -> Callable[[Tensor], None]:
    return lambda x: seen.points.update({name: _rows(x)})


def _keep_first(seen: Observation, name: str) -> Callable[[tuple[Tensor, Any]], None]:
    return lambda results: seen.points.update({name: _rows(results[0])})


def _keep_gap(seen: Observation, layer: int, top_k: int) -> Callable[[Tensor], None]:
    return lambda router: seen.routing_gap.update({layer: _gap(router, top_k)})


def _put(stream: Floats | None) -> Callable[[Tensor], Tensor | None]:
    def put(x: Tensor) -> Tensor | None:
        if stream is None:
            return None
        theirs = torch.from_numpy(stream)[None].to(x.dtype)
        return torch.where(theirs.isnan(), x, theirs)

    return put


def _rows(x: Tensor) -> Floats:
    """[1,T,W] -> f32[T,W]; a copy, the model may go on in the same memory."""
    return np.array(x[0].float().numpy())


def _gap(router: Tensor, top_k: int) -> Floats:
    """Router logits [1,T,E] -> f32[T]."""
    ordered = router[0].float().sort(dim=-1, descending=True).values
    if top_k >= ordered.shape[-1]:
        return np.full(len(ordered), np.inf, np.float32)
    largest = ordered.abs().amax(dim=-1)
    return ((ordered[:, top_k - 1] - ordered[:, top_k]) / largest).numpy()
