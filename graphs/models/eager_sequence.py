"""Driving the eager decoder like the runtime drives the compiled one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from qwen_export.cache_formats import CacheFormat
from qwen_export.graphs.models.model_state import State, empty_state
from qwen_export.graphs.models.text_model import TextModel
from qwen_export.graphs.rotary import rotary_axes, rotary_frequencies


class EagerSequence:
    """One sequence of at most `capacity` tokens. `cos` and `sin` f32[capacity,R/2]: its rotary tables. `caches`: what attention caches keep
    of values, by default all."""

    def __init__(self, model: TextModel, capacity: int, caches: CacheFormat | None = None) -> None:
        self.model = model
        self.place(np.repeat(np.arange(capacity)[:, None], 3, axis=1))
        self.state: State = empty_state(model.config, 1, capacity, model.embed_tokens.weight.dtype, caches=caches)
        self.length = 0

    def place(self, positions: npt.NDArray[np.integer]) -> None:
        """The rotary positions of all tokens, [capacity,3], where they are not those of text."""
        frequencies, scaling = rotary_frequencies(self.model.config)
        axes = list(rotary_axes(self.model.config)) if self.model.config.rope.mrope_section else [0]
        angles = torch.from_numpy(positions.astype(np.float32)[:, axes]) * torch.tensor(frequencies, dtype=torch.float32)
        self.cos, self.sin = angles.cos() * scaling, angles.sin() * scaling

    @torch.no_grad()
    def read(
        self, ids: Sequence[int], features: npt.NDArray[np.float32] | None = None, places: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.float32]:
        """Read tokens; logits of all of them, f32[T,V]. `features` [K,H] stand for the tokens at `places`, [K] positions in `ids`."""
        T = len(ids)
        count = torch.tensor([T])
        logits, _, self.state = self.model(
            torch.tensor([list(ids)]),
            self.cos,
            self.sin,
            torch.tensor([self.length]),
            torch.tensor([0]),
            count,
            torch.arange(T),
            self.state,
            None if features is None else torch.from_numpy(features),
            None if places is None else torch.from_numpy(places),
        )
        # Committed at once: nothing stays pending.
        for layer in self.state:
            for key in layer.keys() & {"pending_qkv", "pending_b", "pending_a"}:
                layer[key] = layer[key][:, :0]
        self.length += T
        return logits.float().numpy()
