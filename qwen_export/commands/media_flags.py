"""The options of commands that read pictures and videos, as one decorator. They reach the command as one argument, `media`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_export.commands.generation_flags import gathered

if TYPE_CHECKING:
    from qwen_export.runtimes.vision.chat_media import MediaOptions

Command = Callable[..., Any]
_COUNT = click.IntRange(1)
_POSITIVE = click.FloatRange(0, min_open=True)

_LIMITS = (
    click.option("--max-pixels", type=_COUNT, metavar="N", help="Scale pictures down to so many pixels; 1024 of them are a token."),
    click.option("--max-video-pixels", type=_COUNT, metavar="N", help="The same for all frames of a video together."),
    click.option("--max-frames", type=_COUNT, metavar="N", help="Take at most so many frames of a video."),
    click.option(
        "--media-host", multiple=True, metavar="NAME", help="Fetch pictures and videos from this host; * is any with a public address."
    ),
)
_LIMIT_NAMES = ("max_pixels", "max_video_pixels", "max_frames", "media_host")
_SERVER = (
    click.option("--media-root", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="DIR", help="Read files below it."),
    click.option("--media-timeout", type=_POSITIVE, metavar="S", help="For a host to send a file; default 20."),
    click.option("--max-media", type=_POSITIVE, metavar="MB", help="Of one file; default 64."),
    click.option("--max-media-tokens", type=_COUNT, metavar="N", help="Of all pictures and videos of a request; default the context."),
    click.option(
        "--max-decoded", type=_COUNT, metavar="N", help="Pixels of a picture before it is scaled, of a video those of all its frames."
    ),
)
_SERVER_NAMES = (*_LIMIT_NAMES, "media_root", "media_timeout", "max_media", "max_media_tokens", "max_decoded")


def media_options(command: Command) -> Command:
    """As `media`, MediaOptions: of a command whose user names files of this machine."""

    @wraps(command)
    def called(*arguments: Any, media: dict[str, Any], **values: Any) -> Any:
        from qwen_export.runtimes.vision.chat_media import MediaOptions
        from qwen_export.runtimes.vision.picture_source import MediaAccess

        access = MediaAccess(hosts=media.pop("media_host", ()))
        return command(*arguments, media=MediaOptions(access, **media), **values)

    return gathered(called, "media", _LIMITS, _LIMIT_NAMES)


def server_media_options(command: Command) -> Command:
    """As `media`, MediaOptions: of a server, whose clients name files and hosts that are allowed alone."""

    @wraps(command)
    def called(*arguments: Any, media: dict[str, Any], **values: Any) -> Any:
        return command(*arguments, media=_of_server(media), **values)

    return gathered(called, "media", (*_LIMITS, *_SERVER), _SERVER_NAMES)


def _of_server(given: dict[str, Any]) -> MediaOptions:
    from dataclasses import replace

    from qwen_export.runtimes.server.server_settings import MEDIA

    root, access = given.pop("media_root", None), MEDIA.access
    access = replace(
        access,
        files=root is not None,
        root=root,
        hosts=given.pop("media_host", ()),
        most_bytes=int(given.pop("max_media", access.most_bytes / 1e6) * 1e6),
        timeout_s=given.pop("media_timeout", access.timeout_s),
    )
    return replace(MEDIA, access=access, **given)
