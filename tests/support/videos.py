"""Video files for tests."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np


def video(
    count: int,
    rate: int = 10,
    height: int = 64,
    width: int = 96,
    kind: str = "mp4",
    codec: str = "libx264",
    *,
    pixels_as: str = "yuv420p",
    milliseconds: Sequence[int] = (),
) -> bytes:
    """Frames of growing brightness, with a red corner. `milliseconds`: when each frame is shown, where they do not come at one rate."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels_as  # type: ignore[attr-defined]
        if milliseconds:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(count):
            pixels = np.full((height, width, 3), i * 6 % 256, np.uint8)
            pixels[: height // 2, : width // 2] = [255, 0, 0]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))  # type: ignore[attr-defined]
        out.mux(stream.encode())  # type: ignore[attr-defined]
    return file.getvalue()


def sound() -> bytes:
    """A file without pictures."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()
