"""What the operator of a server chooses."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_export.runtimes.vision.chat_media import MediaOptions
from qwen_export.runtimes.vision.picture_source import MediaAccess

MEDIA = MediaOptions(MediaAccess(files=False, most_bytes=64_000_000), max_pixels=2 << 20, max_frames=256, max_decoded=16 << 30)


@dataclass(frozen=True)
class ServerSettings:
    """`names`: model names that requests may give; empty: the name of the bundle's directory. `api_keys`: one of them is required, none:
    anyone may ask. `cors_origins`: web pages of these origins may read answers. `allowed_hosts`: values of the Host header, without the
    port; empty: any. `root_path`: the prefix that a proxy removes from addresses.

    Bytes: `max_body` and `max_headers` of a request. `max_queue`: answers that wait beside those that run, None: four per slot.

    Seconds: `header_timeout_s` and `body_timeout_s` for headers and a body to arrive, `queue_timeout_s` until a request has a slot,
    `answer_timeout_s` for a whole answer, `write_timeout_s` without a byte that the client takes, `keep_alive_s` of silence until a comment
    is sent in a stream, `stalled_s` for a step of the engine until /health fails.

    `media`: what pictures and videos of requests may be. By default a client sends them itself and names no file or host, one picture has
    at most 2 megapixels, which a CPU reads for seconds, and a video 8000 frames of 1080p before some are chosen.

    `reasoning_fields`: the names under which chat answers have their reasoning. `page`: whether the page is at /."""

    names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    root_path: str = ""
    max_body: int = 32 << 20
    max_headers: int = 64 << 10
    max_queue: int | None = None
    header_timeout_s: float = 30.0
    body_timeout_s: float = 60.0
    queue_timeout_s: float | None = None
    answer_timeout_s: float | None = None
    write_timeout_s: float = 60.0
    keep_alive_s: float = 10.0
    stalled_s: float = 10.0
    media: MediaOptions = MEDIA
    reasoning_fields: tuple[str, ...] = ("reasoning_content", "reasoning")
    page: bool = True
