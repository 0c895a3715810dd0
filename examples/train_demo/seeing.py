"""A checkpoint that sees as a training module: the text model, the tower, and the head.

A picture's tokens are placeholders in the ids. Their embeddings are replaced by the tower's features, and their positions have three axes
(time, row, column), of which each rotary frequency uses one.
"""

from __future__ import annotations

import torch
from layers import Config
from model import Qwen
from picture_chats import PictureBatch
from picture_marks import seeing
from torch import Tensor
from train_tower import Drawn
from vision_tower import Places, VisionTower

Seen = tuple[Tensor, Tensor, Tensor]
"""What stands for the tokens [B,T,H], and cos and sin of their angles [B,1,T,rotary_dim]."""


def rope_of_pictures(positions: Tensor, c: Config) -> tuple[Tensor, Tensor]:
    """cos and sin [B,1,T,rotary_dim] in fp32 of positions [B,T,3]: frequency i is turned by axis i mod 3, as far as its section goes."""
    parameters = c["rope_parameters"]
    dim = int(c["head_dim"] * parameters["partial_rotary_factor"])
    inverse = parameters["rope_theta"] ** (-torch.arange(0, dim, 2, device=positions.device).float() / dim)
    section = parameters["mrope_section"]
    axes = [i % 3 if i < 3 * section[i % 3] else 0 for i in range(dim // 2)]
    angles = (positions.float()[..., axes] * inverse).repeat(1, 1, 2).unsqueeze(1)
    return angles.cos(), angles.sin()


class SeeingQwen(Qwen):
    """`model.*` and `mtp.*` as in Qwen, and `visual.*`. config: a config.json with text_config and vision_config."""

    def __init__(self, c: Config) -> None:
        super().__init__(c["text_config"])
        self.visual = VisionTower(c["vision_config"])
        self._places: dict[tuple[int, int], Places] = {}

    def features(self, drawn: Drawn) -> Tensor:
        """[S,K,H]."""
        if drawn.size not in self._places:
            patch = seeing().patch_size
            self._places[drawn.size] = Places(drawn.size[0] // patch, drawn.size[1] // patch, seeing(), drawn.levels.device)
        return self.visual(drawn.levels, self._places[drawn.size])

    def seen(self, batch: PictureBatch, features: Tensor) -> Seen:
        """The inputs of `hidden_of`."""
        x = self.model.embed_tokens(batch.ids)
        placeholder = (batch.ids == seeing().image_token) | (batch.ids == seeing().video_token)
        x = x.masked_scatter(placeholder[..., None], features.to(x.dtype))
        return x, *rope_of_pictures(batch.positions, self.config)
