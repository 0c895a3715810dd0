"""Pictures on the targets with standard operators, next to transformers: towers of fixed sizes, and features in all graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.errors import ParameterError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.manifest import load_manifest
from qwen_export.plugins.decompose import decompose_picture_attention
from qwen_export.runtimes import load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.generation import Request, Statistics, generate
from qwen_export.runtimes.decoding.prefix_reuse import PrefixReuse
from qwen_export.runtimes.decoding.prompt_pictures import prompt_read
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.speculation.draft_policy import FixedLength
from qwen_export.runtimes.speculation.drafters import HeadDrafter
from qwen_export.runtimes.speculation.rounds import Speculator
from qwen_export.runtimes.vision.chat_media import MediaOptions
from qwen_export.runtimes.vision.prompt_expansion import ExpandedPrompt
from qwen_export.verification.logit_check import verify
from tests.support.answers import GREEDY
from tests.support.pictures import noise
from tests.support.references import reference_model
from tests.support.synthesize import synthesize
from tests.support.tiny_tokenizer import write_tiny_tokenizer
from tests.test_picture_parity import TOLERANCE, Logits, Subject, error, test_tower, tiny

SIZES = (8, 32, 64)


@pytest.fixture(scope="module", params=[("onnx", "cpu"), ("directml", "dml")], ids=["onnx", "directml"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """A mixture of experts for one of the two, which shares all graphs with what reads pictures."""
    target, device = request.param
    directory = tmp_path_factory.mktemp(f"sees-{target}")
    checkpoint = synthesize(
        tiny(moe=target == "directml"), directory / "checkpoint", tokenizer=write_tiny_tokenizer(directory / "tokenizer")
    )
    options = StaticOptions(16, picture_tokens=SIZES)
    with pytest.MonkeyPatch.context() as patch:
        # The largest size takes its queries in several parts.
        patch.setattr(decompose_picture_attention, "SCORE_BYTES", 100_000)
        bundle = build(checkpoint, directory / "b", target=target, device=device, precision="fp32", max_context=320, options=options)
    with load(bundle, threads=1, device="cpu", speculate=3) as model:
        yield Subject(checkpoint, reference_model(checkpoint), model)


def read(decoder: Decoder, prompt: ExpandedPrompt, cuts: Sequence[int] = ()) -> Logits:
    """Logits of the last token of each part of a prompt."""
    made = []
    for start, stop in zip([0, *cuts], [*cuts, len(prompt.ids)], strict=True):
        for first, last, logits in decoder.parts(stop - start):
            media = prompt.pictures.media
            one = prompt_read(0, prompt.ids, start + first, start + last, media, prompt.pictures, logits)
            rows = decoder.run([one])[0]
            if logits:
                made.append(rows.array[logits - 1].copy())
    return np.stack(made)


@pytest.mark.parametrize("size", [(32, 32), (64, 128), (96, 160), (256, 256)])
def test_the_tower_is_exact_at_every_size(subject: Subject, size: tuple[int, int]) -> None:
    """Alone in a graph, filled up, and at the end of one."""
    test_tower(subject, size)


def test_pictures_of_different_sizes(subject: Subject) -> None:
    pictures = subject.pictures((64, 64), (96, 160), (32, 256))
    prompt = subject.prompt([pictures[0], 3, pictures[1], pictures[2], 8])
    expected = subject.expected(prompt.ids, pictures)
    assert error(read(subject.model.decoder(), prompt), expected[-1:]) <= TOLERANCE


def test_a_prompt_cut_anywhere(subject: Subject) -> None:
    pictures = subject.pictures((64, 96), (64, 64))
    prompt = subject.prompt([4, pictures[0], 2, pictures[1], 3])
    expected = subject.expected(prompt.ids, pictures)
    decoder = subject.model.decoder()
    for cut in (2, 5, 9, 14):
        decoder.reset()
        assert error(read(decoder, prompt, [cut]), expected[[cut - 1, -1]]) <= TOLERANCE
    decoder.reset()
    assert error(read(decoder, prompt, range(1, len(prompt.ids))), expected) <= TOLERANCE


def test_a_video_and_what_follows(subject: Subject) -> None:
    [video] = subject.videos((5, 64, 96))
    prompt, more = subject.prompt([4, video, 6]), [11, 12, 13, 14]
    expected = subject.expected([*prompt.ids, *more], [video])
    decoder = subject.model.decoder()
    assert error(read(decoder, prompt, [9]), expected[[8, len(prompt.ids) - 1]]) <= TOLERANCE
    assert error(decoder.verify(more).array, expected[-4:]) <= TOLERANCE


def test_drafts_behind_a_picture(subject: Subject) -> None:
    pictures = subject.pictures((96, 160), (64, 64))
    prompt = subject.prompt([7, pictures[0], 9, pictures[1], 2])

    def request() -> Request:
        return Request(prompt.ids, Sampler(GREEDY), (), 16, media=prompt.pictures.media, pictures=prompt.pictures)

    alone = list(generate(PrefixReuse(subject.model.decoder()), request(), Statistics()))
    decoder = subject.model.decoder(drafts=True)
    assert decoder.head is not None
    drafter = Speculator(HeadDrafter(decoder.head), FixedLength(3))
    assert list(drafter.generate(PrefixReuse(decoder), request(), Statistics())) == alone


def test_a_picture_that_no_graph_is_large_enough_for(subject: Subject) -> None:
    sight = subject.model.sight
    assert sight is not None
    part = {"type": "image", "image": np.moveaxis(noise(512, 512, 1), 0, -1)}
    with pytest.raises(ParameterError, match=r"256 tokens.*at most 64 tokens, 65536 pixels.*max_pixels"):
        sight.check(part)
    sight.check(part, MediaOptions(max_pixels=65536))


def test_verify_covers_the_tower(subject: Subject) -> None:
    report = verify(subject.model.directory, subject.checkpoint, device="cpu")
    assert report["passed"], report
    assert sum(check["name"] in ("vision tower", "pictures") for check in report["checks"]) == 3


def test_a_tower_for_each_size(subject: Subject) -> None:
    manifest = load_manifest(subject.model.directory)
    towers = {
        name: next(t.shape[1] for t in graph.inputs if t.name == "rows") for name, graph in manifest.graphs.items() if "vision" in name
    }
    assert towers == {f"vision_{size}": size for size in SIZES}


@pytest.mark.parametrize("sizes", [(), (64, 32), (0, 64), (64, 20000), (63,)])
def test_sizes_that_cannot_be_are_refused(tiny_checkpoint: Path, sizes: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedError, match="picture_tokens are sizes up to 16384 tokens, ascending, the last at least 64, and not"):
        plan_build(open_checkpoint(tiny_checkpoint), "onnx", vision=True, max_context=64, options=StaticOptions(16, picture_tokens=sizes))
