"""Whether the vision tower of a manifest fits its decoder and the facts of `vision`. All functions raise ValueError."""

from __future__ import annotations

from qwen_export.bundle_contract import FEATURES, PLACES, VISION_INPUTS
from qwen_export.manifest_types import GraphSpec, Manifest

TOWER = "vision"
_LARGEST_SIDE = 4096


def check_vision(manifest: Manifest, decoder: GraphSpec) -> None:
    """The tower makes what the decoder reads, and is there with the facts that a runtime needs for it. `decoder`: all stages of it."""
    tower, spec = manifest.graphs.get(TOWER), manifest.vision
    reads = {tensor.name: tensor for tensor in decoder.inputs if tensor.name in (FEATURES, PLACES)}
    if (tower is None) != (spec is None) or (tower is not None) != (len(reads) == 2):
        raise ValueError("vision, graph vision and the features of graph decoder do not come together")
    if tower is None or spec is None:
        return
    if tower.file not in manifest.files:
        raise ValueError(f"the file of graph {TOWER} is not listed: {tower.file}")
    P, M, F, D = spec.patch_size, spec.merge_size, spec.temporal_patch_size, spec.head_dim
    if not all(1 <= size <= _LARGEST_SIDE for size in (P, M, F, D, spec.grid)) or D % 4:
        raise ValueError("vision has a size that is none")
    width = next((t.shape[-1] for t in decoder.inputs if t.name == FEATURES), None)
    last = dict(zip(VISION_INPUTS, (3 * F * P * P, 4, 4, D // 2, D // 2), strict=True))
    expected: dict[str, tuple[int | str, ...]] = {name: ("K", M * M, size) for name, size in last.items()}
    expected["rows"] = ("B", *expected["rows"])
    if {t.name: t.shape for t in tower.inputs} != expected or [(t.name, t.shape) for t in tower.outputs] != [(FEATURES, ("B", "K", width))]:
        raise ValueError(f"graph {TOWER} has another signature than vision describes")
    if tower.states or len(manifest.rotary.axes) != len(manifest.rotary.inv_freq) or not all(axis <= 2 for axis in manifest.rotary.axes):
        raise ValueError("rotary.axes has not one of three axes per frequency")
    vocabulary = manifest.model["vocab_size"]
    if not all(token < vocabulary for token in (spec.image_token, spec.video_token, spec.start_token, spec.end_token)):
        raise ValueError("vision has a token that is not in the vocabulary")
    if len(spec.mean) != 3 or len(spec.std) != 3 or not all(0 < value <= 1 for value in spec.std):
        raise ValueError("vision.mean or vision.std is not of three channels")
    if not 1 <= spec.min_pixels <= spec.max_pixels or not 1 <= spec.video_min_pixels <= spec.video_max_pixels:
        raise ValueError("vision has bounds of pixels that nothing is within")
    if not spec.fps > 0 or not 1 <= spec.min_frames <= spec.max_frames:
        raise ValueError("vision has bounds of frames that nothing is within")
