"""One decoder layer over all windows: every product gets its codes before its outputs are computed, so later ones see what it leaves.

    in projections <- norm(x)      x <- x + out(y), y from the quantized in projections      gate, up <- norm(x)      x <- x + down(m)

Each part runs once. The memory is that of one part's weights, or of one expert's, and of a batch of windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_export.building.calibration.delta_net_windows import read_windows
from qwen_export.building.calibration.matrix_calibration import MatrixCalibration
from qwen_export.building.calibration.window_states import WindowStates
from qwen_export.graphs.config import FULL, TextConfig
from qwen_export.graphs.models.mlp_layer import Mlp
from qwen_export.graphs.models.model_state import empty_state
from qwen_export.graphs.models.moe_layer import MoeMlp
from qwen_export.graphs.models.text_model import DecoderLayer
from qwen_export.graphs.ops.moe_op import route
from qwen_export.graphs.quantization.gptq_codes import InputMoments

_MIXER_INPUTS = {
    FULL: [f"self_attn.{name}_proj.weight" for name in "qkv"],
    "": [f"linear_attn.in_proj_{name}.weight" for name in ("qkv", "z", "b", "a", "qkvz", "ba")],
}
_FOLDER_FILES = ("mixer", "inner", "norm")


@dataclass(frozen=True)
class LayerWalk:
    """What all layers share. `cos` and `sin` f32[T,R/2]; `folder` is for the activations inside a layer."""

    config: TextConfig
    matrices: MatrixCalibration
    cos: Tensor
    sin: Tensor
    folder: Path

    @torch.no_grad()
    def walk(self, prefix: str, kind: str, x: WindowStates) -> None:
        """The layer whose parameters begin with `prefix`; `x` is its input, and then its output."""
        with torch.device("meta"):
            layer = DecoderLayer(self.config, kind)
        self._mixer(layer, prefix, x)
        self.matrices.fill(layer.post_attention_layernorm, f"{prefix}post_attention_layernorm.")
        if self.config.is_moe:
            self._experts(cast(MoeMlp, layer.mlp), layer.post_attention_layernorm, f"{prefix}mlp.", x)
        else:
            norm = layer.post_attention_layernorm
            names = [f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up")]
            self.matrices.calibrate(names, self._moments(names, x, norm))
            self._mlp(cast(Mlp, layer.mlp), f"{prefix}mlp.", x, lambda part: norm(x.read(part)), x.add)
        for name in _FOLDER_FILES:
            (self.folder / name).unlink(missing_ok=True)

    def _mixer(self, layer: DecoderLayer, prefix: str, x: WindowStates) -> None:
        norm = layer.input_layernorm
        self.matrices.fill(norm, f"{prefix}input_layernorm.")
        full = layer.kind == FULL
        names = [prefix + name for name in _MIXER_INPUTS[FULL if full else ""]]
        self.matrices.calibrate(names, self._moments(names, x, norm))
        mixer, place, name = (layer.self_attn, "self_attn.", "o_proj") if full else (layer.linear_attn, "linear_attn.", "out_proj")
        out = cast(nn.Linear, getattr(mixer, name))
        setattr(mixer, name, nn.Identity())
        self.matrices.fill(mixer, prefix + place)
        y = self._states("mixer", x, out.in_features)
        for part in x.batches():
            h = norm(x.read(part))
            y.write(part, self._attention(layer, h) if full else read_windows(layer.linear_attn, h))
        self._product(out, f"{prefix}{place}{name}.", y, x.add)

    def _attention(self, layer: DecoderLayer, h: Tensor) -> Tensor:
        B, T, _ = h.shape
        state = empty_state(self.config, B, T)[self.config.layer_types.index(FULL)]
        return cast(Tensor, layer.self_attn(h, state, self.cos[:T], self.sin[:T], torch.zeros(B, dtype=torch.long))[0])

    def _mlp(self, mlp: Mlp, prefix: str, x: WindowStates, read: Callable[[slice], Tensor], add: Callable[[slice, Tensor], None]) -> None:
        """down(silu(gate(h)) up(h)) of the rows that `read` gives; gate and up have their codes."""
        down, mlp.down_proj = mlp.down_proj, cast(nn.Linear, nn.Identity())
        self.matrices.fill(mlp, prefix)
        inner = self._states("inner", x, down.in_features)
        for part in x.batches():
            inner.write(part, mlp(read(part)))
        self._product(down, f"{prefix}down_proj.", inner, add)

    def _product(self, linear: nn.Linear, prefix: str, inputs: WindowStates, add: Callable[[slice, Tensor], None]) -> None:
        """Codes for a product of `inputs`, and its result."""
        names = [f"{prefix}weight"]
        self.matrices.calibrate(names, self._moments(names, inputs))
        self.matrices.fill(linear, prefix)
        for part in inputs.batches():
            add(part, linear(inputs.read(part)))

    def _experts(self, mlp: MoeMlp, norm: nn.Module, prefix: str, x: WindowStates) -> None:
        h = self._states("norm", x, self.config.hidden_size)
        for part in x.batches():
            h.write(part, norm(x.read(part)))
        names = [f"{prefix}shared_expert.{name}_proj.weight" for name in ("gate", "up")]
        self.matrices.calibrate(names, self._moments(names, h))
        self.matrices.fill(mlp.shared_expert_gate, f"{prefix}shared_expert_gate.")
        self.matrices.fill(mlp.gate, f"{prefix}gate.")
        self._mlp(
            mlp.shared_expert,
            f"{prefix}shared_expert.",
            x,
            h.read,
            lambda part, y: x.add(part, mlp.shared_expert_gate(h.read(part)).sigmoid() * y),
        )
        logits = torch.cat([mlp.gate(h.read(part)).flatten(0, 1) for part in h.batches()])
        weight, selected = route(logits, mlp.top_k)
        for expert in range(self.config.num_experts):
            token, slot = torch.where(selected == expert)
            rows = torch.from_numpy(h.flat[token.numpy()])
            gate_up, down = f"{prefix}experts.gate_up_proj", f"{prefix}experts.down_proj"
            self.matrices.calibrate_expert(gate_up, expert, _moments_of(rows))
            gate, up = F.linear(rows, self.matrices.expert_values(gate_up, expert)).chunk(2, dim=-1)
            inner = F.silu(gate) * up
            self.matrices.calibrate_expert(down, expert, _moments_of(inner))
            y = F.linear(inner, self.matrices.expert_values(down, expert)) * weight[token, slot, None]
            x.flat[token.numpy()] += y.numpy()

    def _moments(self, names: list[str], inputs: WindowStates, through: Callable[[Tensor], Tensor] | None = None) -> InputMoments:
        """Of what the matrices `names` read; nothing is read where none of them gets codes."""
        moments = InputMoments(inputs.values.shape[-1])
        if self.matrices.wanted(names):
            for part in inputs.batches():
                moments.add(through(inputs.read(part)) if through else inputs.read(part))
        return moments

    def _states(self, name: str, like: WindowStates, width: int) -> WindowStates:
        return WindowStates(self.folder / name, (like.values.shape[0], like.values.shape[1], width))


def _moments_of(rows: Tensor) -> InputMoments:
    moments = InputMoments(rows.shape[-1])
    moments.add(rows)
    return moments
