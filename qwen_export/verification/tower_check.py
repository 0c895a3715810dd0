"""The pictures of `verify`: the compiled tower against the eager one, and a prompt with pictures against the eager decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qwen_export.bundle_contract import FEATURES, VISION_INPUTS
from qwen_export.cache_formats import CacheFormat
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.quantization.precision_plan import PrecisionPlan
from qwen_export.manifest import Manifest, VisionSpec
from qwen_export.runtimes.decoding.prompt_pictures import prompt_read
from qwen_export.runtimes.memory.buffers import as_bytes, decode
from qwen_export.runtimes.model import Model
from qwen_export.runtimes.vision.patch_positions import patch_positions
from qwen_export.runtimes.vision.picture import Picture, open_picture
from qwen_export.runtimes.vision.picture_size import Bounds
from qwen_export.runtimes.vision.prompt_expansion import ExpandedPrompt, Medium, expand_prompt

if TYPE_CHECKING:
    from qwen_export.graphs.models.text_model import TextModel

FEATURE_TOLERANCE = {"fp32": 2e-5, "tf32": 0.01, "fp16": 0.02, "bf16": 0.15}
"""Largest allowed error of a feature, as a share of the largest one. In the 0.8B's shape fp16 is off by 0.002, bf16 by 0.011."""
ROUNDED_TO_BYTES = 0.06
"""The same where products round what they read to 8 bits: off by 0.023 there."""
_TOKENS = ((2, 3), (3, 1))
"""Sizes of the two pictures, in tokens: neither square nor equal."""
_TEXT = 7

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PictureRun:
    """What a bundle made of two pictures: `features` [tokens,H] of each, and of a prompt with both the `logits` of the tokens from `first`
    on."""

    pictures: tuple[Picture, ...]
    features: tuple[Floats, ...]
    prompt: ExpandedPrompt
    first: int
    logits: Floats


def run_pictures(model: Model) -> PictureRun | None:
    """None for a bundle that reads text only."""
    sight = model.sight
    if sight is None:
        return None
    spec, dtype = sight.spec, next(t.dtype for t in model.manifest.graphs["decoder"].inputs if t.name == FEATURES)
    pictures = small_pictures(spec)
    random, vocabulary = np.random.default_rng(1), model.manifest.model["vocab_size"]
    ids = list[int]()
    for _ in pictures:
        # Text around pictures may not hold what stands for one.
        text = [t for t in random.integers(0, vocabulary, _TEXT).tolist() if t not in (spec.image_token, spec.video_token)]
        ids += [*text, spec.start_token, spec.image_token, spec.end_token]
    media = [Medium(picture, "") for picture in pictures]
    prompt = expand_prompt(ids, None, media, spec, sight.encoder.features, lambda text: [])
    decoder, parts = model.decoder(), []
    half, end = len(prompt.ids) // 2, len(prompt.ids)
    # Where a call has the logits of few tokens only, another graph reads the first half, without logits.
    few = decoder.logit_tokens < half
    step = decoder.logit_tokens if few else end - half
    for start, stop in ((0, half), *((start, min(end, start + step)) for start in range(half, end, step))):
        logits = 0 if few and stop == half else stop - start
        read = prompt_read(0, prompt.ids, start, stop, prompt.pictures.media, prompt.pictures, logits)
        rows = decoder.run([read])[0]
        parts += [rows.array[:logits].copy()] if logits else []
    features = [sight.encoder.features(picture) for picture in pictures]
    wide = tuple(decode(as_bytes(one), dtype, one.shape) for one in features)
    return PictureRun(pictures, wide, prompt, half * few, np.concatenate(parts))


def small_pictures(spec: VisionSpec) -> tuple[Picture, ...]:
    """Of noise, of different sizes."""
    return tuple(_picture(a * spec.factor, b * spec.factor, spec, seed) for seed, (a, b) in enumerate(_TOKENS))


def _picture(height: int, width: int, spec: VisionSpec, seed: int) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return open_picture(pixels, spec, bounds=Bounds(1, height * width))


def eager_features(source: Checkpoint, manifest: Manifest, run: PictureRun, quantization: PrecisionPlan | None) -> list[Floats]:
    """The features that the eager tower makes of the same pictures, in fp32."""
    import torch

    from qwen_export.graphs.models.load_model import load_tower

    spec, tower = manifest.vision, load_tower(source, quantization)
    if spec is None:
        raise AssertionError("a bundle without vision has run no pictures")
    made = []
    for picture in run.pictures:
        rows = picture.rows(spec)
        grid = picture.grid
        positions = patch_positions(grid.rows, grid.columns, spec)
        tokens = grid.tokens(spec.merge_size)
        given = {VISION_INPUTS[0]: rows.reshape(len(rows), tokens, spec.merge_size**2, -1), **positions}
        with torch.no_grad():
            made.append(tower(*(torch.from_numpy(given[name]) for name in VISION_INPUTS))[0].numpy())
    return made


def eager_logits(model: TextModel, run: PictureRun, features: list[Floats], caches: CacheFormat | None = None) -> Floats:
    """The same logits, by the eager decoder with the eager tower's features. `caches`: what attention caches keep of values."""
    from qwen_export.graphs.models.eager_sequence import EagerSequence

    places = np.concatenate([one.places for one in run.prompt.pictures.seen])
    sequence = EagerSequence(model, len(run.prompt.ids), caches)
    sequence.place(run.prompt.pictures.positions)
    return sequence.read(run.prompt.ids, np.concatenate(features), places)[run.first :]
