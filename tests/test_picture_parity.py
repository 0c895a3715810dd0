"""Pictures against transformers, in fp32, on random checkpoints: the tower, and logits of prompts with pictures.

Pixels are prepared once and given to both: how transformers resamples depends on what is installed beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qwen_export import build
from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.prompt_pictures import prompt_read
from qwen_export.runtimes.model import Model
from qwen_export.runtimes.vision.picture import Picture, made_picture
from qwen_export.runtimes.vision.prompt_expansion import ExpandedPrompt, Medium, expand_prompt
from tests.support.family import FAMILY, tiny_config
from tests.support.pictures import noise, seen
from tests.support.references import reference_model
from tests.support.synthesize import synthesize

TOLERANCE = 1e-4
Logits = npt.NDArray[np.float32]


def tiny(**options: Any) -> dict[str, Any]:
    return tiny_config(linear_key_head_dim=32, linear_value_head_dim=32, **options)


def large_tower() -> dict[str, Any]:
    """A width of heads and of the MLP that is a multiple of neither 16 nor 32, as in the towers of 27 blocks, and their merger's form."""
    config = tiny(value_ratio=3)
    config["vision_config"] |= {
        "depth": 3,
        "hidden_size": 72 * 2,
        "num_heads": 2,
        "intermediate_size": 269 * 2,
        "num_position_embeddings": 49,
    }
    return config


SHAPES: dict[str, Callable[[], dict[str, Any]]] = {
    "dense": tiny,
    "moe": lambda: tiny(moe=True),
    "large-tower": large_tower,
}


@dataclass
class Subject:
    checkpoint: Path
    reference: Any
    model: Model

    def prompt(self, parts: Sequence[int | Picture], seed: int = 0) -> ExpandedPrompt:
        """So many random text tokens, or a picture between its start and end; more than one slice is a video."""
        sight = self.model.sight
        assert sight is not None
        random, ids = np.random.default_rng(seed), list[int]()
        for part in parts:
            if isinstance(part, int):
                ids += random.integers(0, 480, part).tolist()
            else:
                pad = sight.spec.video_token if part.grid.slices > 1 else sight.spec.image_token
                ids += [sight.spec.start_token, pad, sight.spec.end_token]
        seconds = [(part, (1.5,) * part.grid.slices * (part.grid.slices > 1)) for part in parts if not isinstance(part, int)]
        media = [Medium(part, "", times) for part, times in seconds]
        return expand_prompt(ids, None, media, sight.spec, sight.encoder.features, lambda text: [5, 6, 7])

    def pictures(self, *sizes: tuple[int, int]) -> list[Picture]:
        sight = self.model.sight
        assert sight is not None
        return [seen(height, width, sight.spec, seed) for seed, (height, width) in enumerate(sizes)]

    def videos(self, *sizes: tuple[int, int, int]) -> list[Picture]:
        """Of so many frames each."""
        sight = self.model.sight
        assert sight is not None
        return [
            made_picture(np.stack([noise(high, wide, 10 * seed + i) for i in range(n)]), sight.spec)
            for seed, (n, high, wide) in enumerate(sizes)
        ]

    @torch.no_grad()
    def expected(self, ids: Sequence[int], pictures: Sequence[Picture]) -> Logits:
        """Logits of all tokens, by transformers, in one call."""
        sight = self.model.sight
        assert sight is not None
        spec = sight.spec
        self.reference.model.rope_deltas = None
        kinds = [{spec.image_token: 1, spec.video_token: 2}.get(token, 0) for token in ids]
        given: dict[str, torch.Tensor] = {}
        for name, grid, slices in (("pixel_values", "image_grid_thw", False), ("pixel_values_videos", "video_grid_thw", True)):
            some = [one for one in pictures if (one.grid.slices > 1) == slices]
            if some:
                given[name] = torch.from_numpy(np.concatenate([one.rows(spec).reshape(-1, 1536) for one in some]))
                given[grid] = torch.tensor([[one.grid.slices, one.grid.rows, one.grid.columns] for one in some])
        made = self.reference(torch.tensor([list(ids)]), mm_token_type_ids=torch.tensor([kinds]), **given)
        return made.logits[0].numpy()

    def read(self, decoder: Decoder, prompt: ExpandedPrompt, cuts: Sequence[int] = ()) -> Logits:
        """Logits of all tokens of a prompt that is read in parts."""
        made, ends = [], [*cuts, len(prompt.ids)]
        for start, stop in zip([0, *cuts], ends, strict=True):
            read = prompt_read(0, prompt.ids, start, stop, prompt.pictures.media, prompt.pictures, stop - start)
            made.append(decoder.run([read])[0].array.copy())
        return np.concatenate(made)


@pytest.fixture(scope="module", params=list(SHAPES))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    directory = tmp_path_factory.mktemp(f"sees-{request.param}")
    checkpoint = synthesize(SHAPES[request.param](), directory / "checkpoint", tokenizer=_tokenizer(directory))
    bundle = build(checkpoint, directory / "bundle", max_context=320)
    with load(bundle, threads=1, speculate=3) as model:
        yield Subject(checkpoint, reference_model(checkpoint), model)


def _tokenizer(directory: Path) -> Path:
    from tests.support.tiny_tokenizer import write_tiny_tokenizer

    return write_tiny_tokenizer(directory / "tokenizer")


def error(got: Logits, expected: Logits) -> float:
    assert got.shape == expected.shape
    assert 0.3 < expected.std() < 1.5
    return float(np.abs(got - expected).max())


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (320, 64), (256, 256)])
def test_tower(subject: Subject, size: tuple[int, int]) -> None:
    [picture] = subject.pictures(size)
    sight = subject.model.sight
    assert sight is not None
    rows, grid = torch.from_numpy(picture.rows(sight.spec)[0]), picture.grid
    with torch.no_grad():
        expected = subject.reference.model.visual(rows, grid_thw=torch.tensor([[1, grid.rows, grid.columns]])).pooler_output.numpy()
    got = sight.encoder.features(picture)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_one_picture(subject: Subject) -> None:
    pictures = subject.pictures((96, 160))
    prompt = subject.prompt([7, pictures[0], 9])
    assert error(subject.read(subject.model.decoder(), prompt), subject.expected(prompt.ids, pictures)) <= TOLERANCE


def test_several_pictures_of_different_sizes(subject: Subject) -> None:
    pictures = subject.pictures((64, 64), (96, 160), (32, 256))
    prompt = subject.prompt([pictures[0], 3, pictures[1], pictures[2], 8])
    assert error(subject.read(subject.model.decoder(), prompt), subject.expected(prompt.ids, pictures)) <= TOLERANCE


def test_a_prompt_cut_anywhere(subject: Subject) -> None:
    pictures = subject.pictures((64, 96), (64, 64))
    prompt = subject.prompt([4, pictures[0], 2, pictures[1], 3])
    expected = subject.expected(prompt.ids, pictures)
    for cut in range(1, len(prompt.ids)):
        assert error(subject.read(subject.model.decoder(), prompt, [cut]), expected) <= TOLERANCE
    assert error(subject.read(subject.model.decoder(), prompt, range(1, len(prompt.ids))), expected) <= TOLERANCE


def test_decoding_behind_a_picture(subject: Subject) -> None:
    pictures = subject.pictures((96, 160))
    prompt = subject.prompt([7, pictures[0], 3])
    more = [11, 12, 13, 14]
    expected = subject.expected([*prompt.ids, *more], pictures)
    decoder = subject.model.decoder()
    subject.read(decoder, prompt)
    for at, token in enumerate(more):
        assert error(decoder.step([token]).array, expected[[len(prompt.ids) + at]]) <= TOLERANCE
    decoder = subject.model.decoder()
    subject.read(decoder, prompt)
    assert error(decoder.verify(more).array, expected[-4:]) <= TOLERANCE


def test_going_back_behind_a_picture(subject: Subject) -> None:
    pictures = subject.pictures((96, 160))
    prompt = subject.prompt([7, pictures[0], 6])
    expected = subject.expected(prompt.ids, pictures)
    decoder = subject.model.decoder()
    cut = len(prompt.ids) - 3
    subject.read(decoder, prompt, [cut])
    mark = None
    decoder.reset()
    read = prompt_read(0, prompt.ids, 0, cut, prompt.pictures.media, prompt.pictures, 0)
    decoder.run([read])
    mark, snapshot = decoder.mark(), decoder.snapshot()
    for _ in range(2):
        decoder.prefill([5, 6, 7])
        decoder.rewind(mark)
        rest = prompt_read(0, prompt.ids, cut, len(prompt.ids), prompt.pictures.media, prompt.pictures, 3)
        assert error(decoder.run([rest])[0].array, expected[cut:]) <= TOLERANCE
        decoder.rewind(mark)
    other = subject.model.decoder()
    other.restore(snapshot)
    assert error(other.run([rest])[0].array, expected[cut:]) <= TOLERANCE


def test_a_video(subject: Subject) -> None:
    [video] = subject.videos((5, 64, 96))
    prompt = subject.prompt([4, video, 6])
    assert len(prompt.pictures.seen[0].places) == 3 * 6
    expected = subject.expected(prompt.ids, [video])
    for cuts in ([], [13], range(1, len(prompt.ids))):
        assert error(subject.read(subject.model.decoder(), prompt, cuts), expected) <= TOLERANCE


def test_pictures_and_videos(subject: Subject) -> None:
    [video, other], [picture] = subject.videos((4, 64, 64), (3, 32, 96)), subject.pictures((64, 96))
    prompt = subject.prompt([video, 4, picture, other, 6])
    expected = subject.expected([*prompt.ids, 9], [video, picture, other])
    decoder = subject.model.decoder()
    assert error(subject.read(decoder, prompt), expected[:-1]) <= TOLERANCE
    assert error(decoder.step([9]).array, expected[-1:]) <= TOLERANCE


@pytest.mark.slow
def test_every_tower_of_the_family_in_small(tmp_path: Path) -> None:
    """Heads and widths as released, one block, over a small decoder."""
    released = {name: config["vision_config"] for name, config in FAMILY.items() if "vision_config" in config}
    towers = {(v["hidden_size"], v["num_heads"], v["intermediate_size"]): v for v in released.values()}
    assert len(towers) == 3
    for number, vision in enumerate(towers.values()):
        config = copy.deepcopy(tiny())
        config["vision_config"] = {**vision, "depth": 1, "out_hidden_size": 64}
        checkpoint = synthesize(config, tmp_path / f"{number}", with_mtp=False, tokenizer=_tokenizer(tmp_path / f"t{number}"))
        with load(build(checkpoint, tmp_path / f"b{number}"), threads=2) as model:
            test_tower(Subject(checkpoint, reference_model(checkpoint), model), (96, 128))
