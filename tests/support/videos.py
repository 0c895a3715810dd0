"""Video files for tests."""

from __future__ import annotations

import io

import av
import numpy as np


def video(count: int, rate: int = 10, height: int = 64, width: int = 96, kind: str = "mp4", codec: str = "libx264") -> bytes:
    """Frames of growing brightness, with a red corner."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"  # type: ignore[attr-defined]
        for i in range(count):
            pixels = np.full((height, width, 3), i * 6 % 256, np.uint8)
            pixels[: height // 2, : width // 2] = [255, 0, 0]
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))  # type: ignore[attr-defined]
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
