"""Whether the vision tower of a manifest fits its decoder and the facts of `vision`. All functions raise ValueError."""

from __future__ import annotations

from collections.abc import Mapping

from qwen_export.bundle_contract import FEATURES, PLACES, REAL_TOKENS, VISION, VISION_INPUTS, is_tower, tower_name
from qwen_export.manifest_types import GraphSpec, Manifest

_LARGEST_SIDE = 4096


def check_vision(manifest: Manifest, decoder: GraphSpec) -> None:
    """The tower makes what the decoder reads, and is there with the facts that a runtime needs for it. `decoder`: all stages of it."""
    towers, spec = {name: graph for name, graph in manifest.graphs.items() if is_tower(name)}, manifest.vision
    reads = {tensor.name: tensor for tensor in decoder.inputs if tensor.name in (FEATURES, PLACES)}
    if bool(towers) != (spec is not None) or bool(towers) != (len(reads) == 2):
        raise ValueError("vision, graph vision and the features of graph decoder do not come together")
    if spec is None:
        return
    missing = next((name for name, tower in towers.items() if tower.file not in manifest.files), None)
    if missing is not None:
        raise ValueError(f"the file of graph {missing} is not listed: {towers[missing].file}")
    P, M, F, D = spec.patch_size, spec.merge_size, spec.temporal_patch_size, spec.head_dim
    if not all(1 <= size <= _LARGEST_SIDE for size in (P, M, F, D, spec.grid)) or D % 4:
        raise ValueError("vision has a size that is none")
    width = next((t.shape[-1] for t in decoder.inputs if t.name == FEATURES), None)
    last = dict(zip(VISION_INPUTS, (3 * F * P * P, 4, 4, D // 2, D // 2), strict=True))
    _check_towers(towers, {name: (M * M, size) for name, size in last.items()}, width)
    if len(manifest.rotary.axes) != len(manifest.rotary.inv_freq) or not all(axis <= 2 for axis in manifest.rotary.axes):
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


def _check_towers(towers: Mapping[str, GraphSpec], last: Mapping[str, tuple[int, int]], width: object) -> None:
    """One graph for any number of slices and tokens, or one for each of some numbers of tokens. `last`: the last dims of each input."""
    if VISION in towers and len(towers) > 1:
        raise ValueError(f"graph {VISION} is beside others of a fixed size")
    for name, tower in towers.items():
        K = "K" if name == VISION else next((t.shape[1] for t in tower.inputs if t.name == VISION_INPUTS[0] and len(t.shape) > 1), 0)
        B: int | str = "B" if name == VISION else 1
        expected: dict[str, tuple[int | str, ...]] = {key: (K, *sizes) for key, sizes in last.items()}
        expected[VISION_INPUTS[0]] = (B, *expected[VISION_INPUTS[0]])
        if isinstance(K, int):
            expected[REAL_TOKENS] = (1,)
        signature = {t.name: t.shape for t in tower.inputs}, [(t.name, t.shape) for t in tower.outputs]
        if signature != (expected, [(FEATURES, (B, K, width))]) or tower.states or (isinstance(K, int) and name != tower_name(K)):
            raise ValueError(f"graph {name} has another signature than vision describes")
