"""A video file to the frames that the model sees, and the time of each pair of them.

Frames are taken evenly over the whole video, so many as `fps` asks for within bounds (transformers: Qwen3VLVideoProcessor). The file is
decoded from front to back, and each frame that is kept is scaled at once: memory does not depend on the length of the video. Containers
without a number of frames are read once more, to count. Phones turn videos by a note in the file, which is followed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qwen_export.errors import ParameterError
from qwen_export.extras import needed_for
from qwen_export.manifest import VisionSpec
from qwen_export.runtimes.vision.decode_picture import MOST_DECODED, planes_of_array
from qwen_export.runtimes.vision.picture_size import Bounds, frame_size
from qwen_export.runtimes.vision.resample import Pixels, resized

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,gif,ogg,asf,h264,hevc,ivf,wmv,nut"
"""What is read, by FFmpeg's names. Lists that name other files are not among them: a request could read files of this machine."""
MOST_FRAMES = 1_000_000
"""Frames of a file: ten hours at 30 per second."""

# Decoders of damaged files raise whatever they run into.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError, RuntimeError)


class VideoFrames(NamedTuple):
    """`pixels` u8[F,3,H,W] at the final size; `seconds` of each slice of two frames."""

    pixels: Pixels
    seconds: tuple[float, ...]


class FrameRules(NamedTuple):
    """How frames are chosen: `fps` of them per second, at least `least` and at most `most`; `pixels` bounds those of all frames.
    `decoded`: pixels that all frames of the file have together, 0 for no limit."""

    fps: float
    least: int
    most: int
    pixels: Bounds
    decoded: int = 0


def decode_video(data: bytes, spec: VisionSpec, rules: FrameRules, where: str) -> VideoFrames:
    """Of an encoded file. Raises ParameterError in one message, and MissingExtra where PyAV is not installed."""
    with needed_for("decoding videos"):
        import av
    try:
        return _decoded(av, data, spec, rules, where)
    except ParameterError:
        raise
    except (av.FFmpegError, *_DAMAGE) as error:
        raise _bad("a video cannot be decoded", where, f"{type(error).__name__}: {error}", "Save or send it again.") from error


def frames_as_given(frames: Sequence[Any], spec: VisionSpec, rules: FrameRules, where: str) -> VideoFrames:
    """All of these frames, u8[H,W,3] of one size, which are `rules.fps` per second."""
    planes = [planes_of_array(frame, where) for frame in frames]
    if len({plane.shape for plane in planes}) > 1:
        raise _bad("the frames of a video have different sizes", where, "several sizes", "Scale them to one size.")
    _check_count(len(planes), where)
    if len(planes) > rules.most:
        raise _bad("a video has too many frames", where, f"{len(planes)} frames", f"Give at most {rules.most}.")
    height, width = _size(len(planes), planes[0].shape[1], planes[0].shape[2], spec, rules, where)
    made = np.stack([resized(plane, height, width) for plane in planes])
    return VideoFrames(made, _seconds([i / rules.fps for i in range(len(planes))], spec))


def _decoded(av: Any, data: bytes, spec: VisionSpec, rules: FrameRules, where: str) -> VideoFrames:
    with _open(av, data) as file:
        stream = _stream(file, where)
        counted, rate, area = int(stream.frames), float(stream.average_rate or 0), stream.width * stream.height
    if not counted:
        counted = _count(av, data)
    if not 0 < rate < 10_000:
        rate = 24.0  # as transformers assumes
    for _ in range(2):
        if counted > MOST_FRAMES:
            raise _bad("a video is too long", where, f"{counted} frames", f"Cut it to {MOST_FRAMES} frames.")
        if rules.decoded and counted * area > rules.decoded:
            size = f"{counted} frames of {area} pixels"
            raise _bad("a video is too long", where, size, "Cut it, or scale it down.", f"at most {rules.decoded} pixels in all")
        _check_count(counted, where)
        wanted = frame_indices(counted, rate, rules)
        frames, times, seen = _chosen(av, data, wanted, spec, rules, where)
        if len(frames) == len(wanted):
            return VideoFrames(np.stack(frames), _seconds(_times(wanted, times, rate), spec))
        counted = seen  # the file has fewer frames than its header says
    raise _bad("a video cannot be decoded", where, f"{seen} frames", "Save or send it again.")


def frame_indices(count: int, rate: float, rules: FrameRules) -> list[int]:
    """Which of `count` frames, of which there are `rate` per second."""
    wanted = min(max(int(count / rate * rules.fps), rules.least), rules.most, count)
    return [int(index) for index in np.linspace(0, count - 1, wanted).round()]


def _times(wanted: Sequence[int], times: Sequence[float | None], rate: float) -> list[float]:
    """Seconds of each frame: by its number, or by its own time where frames do not come at one rate."""
    even = [index / rate for index in wanted]
    if any(time is None for time in times):
        return even
    first = times[0] or 0.0
    own = [(time or 0.0) - first for time in times]
    drift = max(abs(a - b) for a, b in zip(even, own, strict=True))
    return even if drift <= 0.5 / rate or any(b < a for a, b in pairwise(own)) else own


def _seconds(times: list[float], spec: VisionSpec) -> tuple[float, ...]:
    """The middle of the frames of each slice; a last one alone is its own partner."""
    size = spec.temporal_patch_size
    times = times + [times[-1]] * (-len(times) % size)
    return tuple((times[i] + times[i + size - 1]) / 2 for i in range(0, len(times), size))


def _chosen(
    av: Any, data: bytes, wanted: Sequence[int], spec: VisionSpec, rules: FrameRules, where: str
) -> tuple[list[Pixels], list[float | None], int]:
    """The frames of these indices, scaled; their times; and how many frames were read."""
    made: list[Pixels] = []
    times: list[float | None] = []
    size, read = (0, 0), 0
    with _open(av, data) as file:
        _stream(file, where).thread_type = "AUTO"
        for frame in _frames(file):
            while len(made) < len(wanted) and wanted[len(made)] == read:
                planes = _planes(frame, where)
                if not made:
                    size = _size(len(wanted), planes.shape[1], planes.shape[2], spec, rules, where)
                made.append(resized(planes, *size))
                times.append(frame.time)
            read += 1
            if len(made) == len(wanted) or read > MOST_FRAMES:
                break
    return made, times, read


def _frames(file: InputContainer) -> Iterator[VideoFrame]:
    yield from file.decode(video=0)


def _planes(frame: VideoFrame, where: str) -> Pixels:
    if frame.width * frame.height > MOST_DECODED:
        raise _bad("a video is too large", where, f"{frame.width}x{frame.height} pixels", "Scale it down.")
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return planes_of_array(np.rot90(pixels, turns) if turns else pixels, where)


def _size(count: int, height: int, width: int, spec: VisionSpec, rules: FrameRules, where: str) -> tuple[int, int]:
    return frame_size(count, height, width, spec.factor, spec.temporal_patch_size, rules.pixels, where)


def _check_count(count: int, where: str) -> None:
    if count < 2:
        got = "one frame" if count else "no frames"
        raise _bad("a video has too few frames", where, got, "Send a single frame as a picture.", "at least 2")


def _count(av: Any, data: bytes) -> int:
    with _open(av, data) as file:
        return sum(packet.pts is not None for packet in file.demux(video=0))


def _open(av: Any, data: bytes) -> Any:
    # The whitelist of protocols is that of what a file names; the file itself is read from memory.
    return av.open(io.BytesIO(data), mode="r", options={"format_whitelist": CONTAINERS, "protocol_whitelist": "none"})


def _stream(file: Any, where: str) -> Any:
    if not file.streams.video:
        kinds = ", ".join(sorted({stream.type for stream in file.streams})) or "nothing"
        raise _bad("the file holds no video", where, kinds, "Give a file with pictures that move.")
    stream = file.streams.video[0]
    if stream.codec_context is None:  # such a stream has no size either
        raise _bad("a video cannot be decoded", where, "a codec that is not known", "Save it as H.264 in MP4.")
    if (stream.width or 0) * (stream.height or 0) > MOST_DECODED:
        raise _bad("a video is too large", where, f"{stream.width}x{stream.height} pixels", "Scale it down.")
    return stream


def _bad(what: str, where: str, got: str, fix: str, expected: str = "") -> ParameterError:
    return ParameterError(what, parameter="messages", where=where, got=got, expected=expected, fix=fix)
