"""Videos: which frames are taken, when they are, and what becomes of files that are none."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_export.errors import ParameterError
from qwen_export.runtimes import load
from qwen_export.runtimes.vision.chat_media import MediaOptions
from qwen_export.runtimes.vision.decode_video import FrameRules, decode_video, frame_indices, frames_as_given
from qwen_export.runtimes.vision.picture_size import Bounds, frame_size
from tests.support.pictures import SPEC, encoded, photo
from tests.support.videos import sound, video

RULES = FrameRules(2.0, 4, 768, Bounds(4096, 25165824))


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")])
def test_frames_and_times(kind: str, codec: str) -> None:
    """37 frames at 10 per second. Matroska and WebM have no number of frames."""
    found = decode_video(video(37, 10, 60, 90, kind, codec), SPEC, RULES, "")
    assert found.pixels.shape == (7, 3, 64, 96)
    assert [f"{one:.1f}" for one in found.seconds] == ["0.3", "1.5", "2.7", "3.6"]
    levels = found.pixels[:, 0, -8:, -8:].mean(axis=(1, 2))
    np.testing.assert_allclose(levels, [i * 6 for i in (0, 6, 12, 18, 24, 30, 36)], atol=8)


@pytest.mark.parametrize(
    ("count", "rate", "expected"),
    [(37, 10, [0, 6, 12, 18, 24, 30, 36]), (3, 30, [0, 1, 2]), (20, 30, [0, 6, 13, 19]), (2, 1, [0, 1])],
)
def test_which_frames_are_taken(count: int, rate: float, expected: list[int]) -> None:
    assert frame_indices(count, rate, RULES) == expected
    assert len(frame_indices(100_000, 25, RULES)) == 768


@pytest.mark.parametrize(
    ("given", "expected"),
    [((120, 1080, 1920), (320, 608)), ((768, 1080, 1920), (128, 224)), ((20, 1080, 1920), (832, 1472)), ((2, 20, 40), (32, 64))],
)
def test_sizes_count_all_frames(given: tuple[int, int, int], expected: tuple[int, int]) -> None:
    assert frame_size(*given, 32, 2, RULES.pixels) == expected


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_frames_that_come_at_no_fixed_rate_have_their_own_times(kind: str) -> None:
    """Ten in the first second, then one each second: by its number the last frame would be at 1.7 s, and it is at 8 s."""
    when = [100 * i for i in range(10)] + [1000 * i for i in range(1, 9)]
    found = decode_video(video(18, 10, kind=kind, milliseconds=when), SPEC, RULES, "")
    assert found.seconds[0] < 1 and 4.5 < found.seconds[-1] <= 8 and list(found.seconds) == sorted(found.seconds)


def test_more_bits_per_pixel_are_read() -> None:
    found = decode_video(video(8, pixels_as="yuv420p10le"), SPEC, RULES, "")
    np.testing.assert_allclose(found.pixels[-1, 0, -8:, -8:].mean(), 42, atol=8)


def test_a_video_of_too_many_pixels_is_not_decoded() -> None:
    with pytest.raises(ParameterError, match=r"too long.*got 30 frames of 6144 pixels.*at most 100000"):
        decode_video(video(30), SPEC, FrameRules(2.0, 4, 768, RULES.pixels, 100_000), "")


def test_frames_can_be_given() -> None:
    frames = [np.full((64, 64, 3), level, np.uint8) for level in (0, 100, 200)]
    found = frames_as_given(frames, SPEC, RULES, "")
    assert found.pixels.shape == (3, 3, 64, 64)
    assert found.seconds == (0.25, 1.0)


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be decoded"),
    "no video": (b"hello", "cannot be decoded"),
    "a list of files": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "cannot be decoded"),
    "a list for ffmpeg": (b"ffconcat version 1.0\nfile /etc/passwd\n", "cannot be decoded"),
    "one frame": (video(1), "too few frames"),
    "audio only": (sound(), "holds no video"),
    "truncated": (video(30)[:700], "cannot be decoded"),
    "a picture": (encoded(photo(64, 64), "JPEG"), "cannot be decoded|too few frames"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_video_is_one_message(name: str) -> None:
    data, message = REFUSED[name]
    with pytest.raises(ParameterError, match=message) as refused:
        decode_video(data, SPEC, RULES, "messages[0].content[0]")
    assert "messages[0].content[0]" in str(refused.value) and refused.value.fix and "\n" not in str(refused.value)


_FILES = [video(8), video(8, kind="matroska"), video(8, kind="avi", codec="mpeg4")]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_damage_is_a_video_or_one_message(data: st.DataObject) -> None:
    file = bytearray(data.draw(st.sampled_from(_FILES)))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(file) - 1), st.integers(0, 255)), max_size=12)):
        file[at] = value
    file = file[: data.draw(st.integers(0, len(file)))] if data.draw(st.booleans()) else file
    try:
        found = decode_video(bytes(file), SPEC, RULES, "")
    except ParameterError as error:
        assert "\n" not in str(error)
    else:
        assert len(found.seconds) == -(-len(found.pixels) // 2)


def test_a_chat_about_a_video(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(video(12))
    url = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    forms: list[Any] = [str(path), path, path.read_bytes(), url]
    with load(tiny_bundle) as model:
        requests = []
        for form in forms:
            content = [{"type": "text", "text": "see "}, {"type": "video", "video": form}, {"type": "image", "image": photo(32, 32)}]
            requests.append(model.prepare_chat([{"role": "user", "content": content}], media=MediaOptions(min_pixels=1024)).request)
        assert len({tuple(one.ids) for one in requests}) == 1 and len({one.media for one in requests}) == 1
        text = model.tokenizer.decode(requests[0].ids)
    slices = "".join(f"<{time} seconds><|vision_start|>{'<|video_pad|>' * 6}<|vision_end|>" for time in ("0.2", "0.9"))
    assert f"see <|vision_start|>{slices}<|vision_end|><|vision_start|><|image_pad|><|vision_end|>" in text


def test_a_call_bounds_videos(tiny_bundle: Path) -> None:
    chat = [{"role": "user", "content": [{"type": "video", "video": video(40)}]}]
    with load(tiny_bundle) as model:
        counts = [
            len(model.prepare_chat(chat, media=options).request.pictures.seen[0].places)  # type: ignore[union-attr]
            for options in (MediaOptions(), MediaOptions(max_frames=4), MediaOptions(max_video_pixels=8 * 64 * 32))
        ]
    assert counts == [4 * 6, 2 * 6, 4 * 1]
