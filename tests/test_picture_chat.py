"""Chats with pictures through the model and the engine: parts of messages, several pictures, what is kept between turns, and drafts."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_export import build
from qwen_export.errors import ContextOverflow, ParameterError, TemplateError
from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.model import Model
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.vision.chat_media import MediaOptions
from qwen_export.runtimes.vision.picture import open_picture
from qwen_export.runtimes.vision.picture_source import MediaAccess
from qwen_export.runtimes.vision.prompt_expansion import Medium, expand_prompt
from tests.support.pictures import SPEC, encoded, photo

GREEDY = SamplingParams(greedy=True)
SMALL = MediaOptions(min_pixels=32 * 32, max_pixels=96 * 96)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Path:
    return tiny_bundle


def message(*parts: Any, role: str = "user") -> dict[str, Any]:
    """Texts, and pictures."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts]
    return {"role": role, "content": content}


def answer(model: Model, messages: list[dict[str, Any]], tokens: int = 12, **options: Any) -> tuple[list[int], int]:
    """Token ids of the answer, and tokens of the prompt that were not read again."""
    options = {"sampling": GREEDY, "max_new_tokens": tokens, "media": SMALL} | options
    generation = model.stream(messages, **options)
    for _ in generation:
        pass
    return generation.tokens, generation.statistics.reused_tokens


def prompt_ids(model: Model, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    return list(model.prepare_chat(messages, **({"media": SMALL} | options)).request.ids)


def test_a_picture_is_a_token_per_part_of_it(bundle: Path) -> None:
    with load(bundle) as model:
        spec = model.manifest.vision
        assert spec is not None
        ids = prompt_ids(model, [message("look: ", photo(64, 96), " and ", photo(32, 32))])
        at = [i for i, token in enumerate(ids) if token == spec.image_token]
        assert len(at) == 6 + 1
        assert ids[at[0] - 1] == spec.start_token and ids[at[5] + 1] == spec.end_token


def test_forms_of_parts(bundle: Path, tmp_path: Path) -> None:
    data = encoded(photo(64, 64))
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    url = f"data:image/png;base64,{text}"
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": str(path)},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": path.as_uri()},
        {"type": "image", "base64": text},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"image": data},
    ]
    with load(bundle) as model:
        requests = [model.prepare_chat([{"role": "user", "content": [part]}], media=SMALL).request for part in parts]
    assert len({tuple(request.ids) for request in requests}) == 1
    assert len({request.media for request in requests}) == 1


def test_pictures_in_results_of_tools_follow_the_calls(bundle: Path) -> None:
    """Results are put into the order of the calls, and their pictures with them."""
    calls = [{"id": name, "type": "function", "function": {"name": "see", "arguments": "{}"}} for name in ("a", "b")]
    results = [{**message("it: ", photo(32, 32 * n)), "role": "tool", "tool_call_id": name} for name, n in (("b", 2), ("a", 1))]
    chat = [message("see"), {"role": "assistant", "content": "", "tool_calls": calls}, *results]
    with load(bundle) as model:
        media = model.prepare_chat(chat, media=SMALL).request.media
    assert [one.count for one in media] == [1, 2]


def test_pictures_can_be_numbered(bundle: Path) -> None:
    chat = [message(photo(32, 32)), {"role": "assistant", "content": "ok"}, message(photo(32, 32), " and ", photo(32, 32))]
    with load(bundle) as model:
        text = model.tokenizer.decode(prompt_ids(model, chat, template_kwargs={"add_vision_id": True}))
    assert [f"Picture {n}: <|vision_start|>" in text for n in (1, 2, 3, 4)] == [True, True, True, False]


@pytest.mark.parametrize("speculate", [1, 3, 8, "lookup"])
def test_texts_with_drafts_are_those_without(bundle: Path, speculate: int | str) -> None:
    chats = [[message("a ", photo(64, 96, seed), " b ", photo(96, 32, seed + 1), " c")] for seed in range(3)]
    with load(bundle, speculate="off") as plain, load(bundle, speculate=speculate) as drafted:
        for chat in chats:
            assert answer(drafted, chat, 24)[0] == answer(plain, chat, 24)[0]


def test_drafts_do_not_depend_on_how_a_picture_is_read(bundle: Path) -> None:
    """The head reads what stands for the tokens of a picture, however prompts are cut."""
    chat = [message("a ", photo(64, 96), " b")]
    rows = []
    with load(bundle) as model:
        request = model.prepare_chat(chat, media=SMALL).request
        assert request.pictures is not None
        for size in (3, 100):
            decoder = model.decoder(drafts=True)
            for start in range(0, len(request.ids), size):
                stop = min(len(request.ids), start + size)
                features, places = request.pictures.features(start, stop)
                positions = request.pictures.places_at(start, stop)
                decoder.run([Read(0, request.ids[start:stop], features=features, places=places, positions=positions)])
            assert decoder.head is not None
            rows.append(np.array(decoder.head.first({0: 7})[0].array))
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)


def test_two_questions_about_two_pictures_of_equal_size(bundle: Path) -> None:
    """Their ids are equal, and their answers are not."""
    with load(bundle) as model:
        first, other = ([message("what is it? ", photo(96, 96, seed))] for seed in (1, 2))
        assert prompt_ids(model, first) == prompt_ids(model, other)
        answers = [answer(model, chat) for chat in (first, other, first)]
        assert answers[0][0] == answers[2][0] != answers[1][0]
        with load(bundle) as fresh:
            assert answer(fresh, other)[0] == answers[1][0]


def test_a_conversation_goes_on_without_reading_its_pictures_again(bundle: Path) -> None:
    with load(bundle) as model, load(bundle) as fresh:
        sight = model.sight
        assert sight is not None
        chat = [message("one ", photo(96, 96))]
        answer(model, chat)
        before = sight.encoder.encoded
        longer = [*chat, {"role": "assistant", "content": "yes"}, message("two ", photo(64, 64, 5), " end")]
        tokens, reused = answer(model, longer)
        assert reused > 9  # the picture of the first turn is among them
        assert sight.encoder.encoded == before + 1
        assert tokens == answer(fresh, longer)[0]


def test_a_picture_that_comes_again_is_encoded_once(bundle: Path) -> None:
    with load(bundle) as model:
        for text in ("a", "b", "c"):
            answer(model, [message(text, photo(96, 96), photo(96, 96))])
        assert model.sight is not None and model.sight.encoder.encoded == 1


def test_the_engine_answers_different_pictures_side_by_side(bundle: Path) -> None:
    """As each alone, with drafts and without, and with texts between them."""
    chats = [[message("a ", photo(64, 96, seed), f" {seed}")] for seed in range(3)]
    chats += [[message("only text")], [message(photo(64, 96, 0), photo(64, 96, 1), " both")]]
    # Pictures of one token have the positions of text, and ids that are equal.
    chats += [[message("see ", photo(32, 32, seed), " it")] for seed in (7, 8)]
    with load(bundle, speculate="off") as model:
        alone = [answer(model, chat, 10)[0] for chat in chats]
    for speculate in ("off", "auto"):
        with load(bundle, speculate=speculate) as model, Engine.of(model, 3) as engine:
            prepared = [model.prepare_chat(chat, sampling=GREEDY, max_new_tokens=10, media=SMALL) for chat in [*chats, chats[0]]]
            assert [list(stream) for stream in [engine.submit(one.request) for one in prepared]] == [*alone, alone[0]]


def test_placeholders_in_a_text_are_text(bundle: Path) -> None:
    with load(bundle) as model:
        spec = model.manifest.vision
        assert spec is not None
        ids = prompt_ids(model, [message("literally <|image_pad|> and ", photo(32, 32))])
        assert ids.count(spec.image_token) == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no source": ({"type": "image"}, "has no source"),
    "two sources": ({"type": "image", "image": "a", "url": "b"}, "more than one source"),
    "no such file": ({"type": "image", "image": "/no/such.png"}, "there is no such file"),
    "an address": ({"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}, "not fetched from this host"),
    "a wrong bound": ({"type": "image", "image": b"", "max_pixels": -1}, "max_pixels of a part"),
    "audio": ({"type": "input_audio", "input_audio": {"data": ""}}, "something else than text"),
    "a video": ({"type": "video", "video": "/no/such.mp4"}, "there is no such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parts_that_are_refused(bundle: Path, name: str) -> None:
    part, expected = REFUSED[name]
    with load(bundle) as model, pytest.raises(ParameterError, match=expected) as refused:
        model.prepare_chat([message("x"), {"role": "user", "content": [{"type": "text", "text": "y"}, part]}])
    assert "messages[1].content[1]" in str(refused.value)


def test_a_picture_in_a_system_message_is_refused_by_the_template(bundle: Path) -> None:
    with load(bundle) as model, pytest.raises(TemplateError, match="system message cannot hold a picture"):
        prompt_ids(model, [message("x ", photo(32, 32), role="system"), message("y")])


@pytest.mark.parametrize("ids", [[1, 2], [SPEC.image_token] * 2, [SPEC.video_token]])
def test_a_picture_that_the_template_does_not_write_is_an_error(ids: list[int]) -> None:
    """Its text would be answered as if the picture were there."""
    with pytest.raises(ParameterError, match="one placeholder for each"):
        expand_prompt(ids, None, [Medium(open_picture(photo(32, 32), SPEC), "")], SPEC, lambda picture: np.zeros(0), lambda text: [])


def test_a_prompt_that_is_too_long_is_refused_before_the_tower_runs(bundle: Path) -> None:
    with load(bundle, max_context=64) as model:
        with pytest.raises(ContextOverflow):
            answer(model, [message(photo(320, 320))], media=MediaOptions())
        assert model.sight is not None and model.sight.encoder.encoded == 0


def test_bounds_of_a_part_narrow_those_of_the_call(bundle: Path) -> None:
    def tokens(model: Model, part: dict[str, Any], options: MediaOptions) -> int:
        prepared = model.prepare_chat([{"role": "user", "content": [{"type": "image", "image": photo(640, 640), **part}]}], media=options)
        return prepared.request.media[0].count

    with load(bundle) as model:
        assert tokens(model, {}, MediaOptions()) == 400
        assert tokens(model, {"max_pixels": 128 * 128}, MediaOptions()) == 16
        assert tokens(model, {}, MediaOptions(max_pixels=64 * 64)) == 4
        assert tokens(model, {"max_pixels": 128 * 128}, MediaOptions(max_pixels=64 * 64)) == 4
        with pytest.raises(ParameterError, match="not read from files"):
            tokens(model, {"image": "/etc/hostname"}, MediaOptions(MediaAccess(files=False)))


def test_a_build_without_the_tower_reads_no_pictures(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plain = build(tiny_checkpoint, tmp_path / "plain", vision=False, mtp=False)
    with load(plain) as model:
        assert model.sight is None and "vision" not in model.manifest.graphs
        with pytest.raises(ParameterError, match="which the bundle cannot read"):
            prompt_ids(model, [message(photo(32, 32))])


def test_a_decoder_in_stages_sees_the_same(tiny_checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    """Its reads are longer than its calls, and cut pictures."""
    staged = build(tiny_checkpoint, tmp_path / "staged", stages=2)
    chat = [message("first ", photo(256, 288, 1), " then ", photo(96, 64, 2), " end")]
    with load(bundle, speculate="off") as whole, load(staged, speculate="off") as stages, load(staged, speculate=3) as drafts:
        expected = answer(whole, chat, media=MediaOptions(min_pixels=1024))[0]
        assert answer(stages, chat, media=MediaOptions(min_pixels=1024))[0] == expected
        assert answer(drafts, chat, media=MediaOptions(min_pixels=1024))[0] == expected
