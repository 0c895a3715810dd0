"""The shape of a call of a graph with dynamic shapes: what it is bound for, and whether it comes back."""

from __future__ import annotations

from typing import NamedTuple

from qwen_export.manifest import Manifest

# Tokens per prefill call: enough to keep matrix products busy, few enough to bound the activations.
PREFILL_CHUNK = {"cpu": 256, "cuda": 2048}
# Quantized products are at full speed from fewer on; calls of a mixture of experts are split over the experts, and need more.
_QUANTIZED_CHUNK, _MOE_CHUNK = 96, 512


class CallShape(NamedTuple):
    """`b` sequences from slot `first` on, `T` new tokens each, logits of the last `rows`. `commit`: the tokens enter the state.
    `pending`, `stride`: the set of pending inputs that the call reads; `leaves`: the stride of the other one, where it leaves its own, 0
    where it commits. `own`: its sequence has rotary tables of its own. `turn`: which of several equal calls that run at a time.
    `features`: tokens of pictures."""

    b: int
    T: int
    rows: int
    first: int
    commit: bool = True
    pending: int = 0
    stride: int = 1
    leaves: int = 0
    own: bool = False
    turn: int = 0
    features: int = 0

    def comes_back(self, chunk: int) -> bool:
        """Steps, drafts, whole chunks and powers of two do; odd sizes of prompts' ends do not."""
        return not self.commit or ((self.T in (1, chunk) or _is_power(self.T)) and self.features in (0, self.T))

    def repeats(self, slots: int, width: int) -> bool:
        """Whether a call is worth recording: a verify behind one as long, or a step of all sequences or the first 1, 2, 4, 8, ...
        `width`: the stride of a set that single sequences fill."""
        if not self.commit:
            return self.stride == self.leaves
        step = self.T == 1 and self.rows == 1 and self.first == 0 and self.stride == width
        return step and (self.b == slots or _is_power(self.b))


# Stages read pieces of a prompt side by side: so many tokens are one piece, and so many pieces one read. Filling and emptying the stages
# costs the time of as many pieces as there are stages.
_PIECE = {"cpu": 64, "cuda": 1024}
PIECES = 8


def prompt_piece(device: str, manifest: Manifest, *, overlaps: bool) -> int:
    """Tokens of a prompt per call. `overlaps`: calls run side by side."""
    return _PIECE[device] if overlaps else prefill_chunk(device, manifest)


def prefill_chunk(device: str, manifest: Manifest) -> int:
    """Tokens per prefill call."""
    if device == "cpu" and manifest.model.get("num_experts"):
        return _MOE_CHUNK
    if device == "cpu" and manifest.target.precision in ("int8", "int4"):
        return _QUANTIZED_CHUNK
    return PREFILL_CHUNK[device]


def _is_power(count: int) -> bool:
    """Whether it is a power of two."""
    return count & (count - 1) == 0
