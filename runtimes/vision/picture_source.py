"""Where the bytes of a picture come from: a file, a data URL, an address, or what the caller has in memory.

What a request may name is decided by `MediaAccess`: a server lets its clients read no files, and addresses only of hosts it knows.
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from qwen_export.errors import ParameterError
from qwen_export.runtimes.vision.fetch_media import fetched

MOST_BYTES = 256 << 20
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class MediaAccess:
    """What the pictures and videos of a request may come from. `files`: paths on this machine, with `root` those below this directory.
    `hosts`: names of hosts whose http and https addresses are read, none by default, since a request makes this machine ask them; "*" is
    any host with a public address. `most_bytes` of one encoded file, which a host must send within `timeout_s` seconds."""

    files: bool = True
    root: Path | None = None
    hosts: tuple[str, ...] = ()
    most_bytes: int = MOST_BYTES
    timeout_s: float = TIMEOUT_S


def named_source(source: object, where: str) -> str:
    """Where a picture is, for messages: of a path or an address the source itself, too."""
    if not isinstance(source, (str, os.PathLike)) or str(source)[:5].lower() == "data:":
        return where
    return ", ".join(filter(None, (where, _short(str(source)))))


def read_source(source: str | os.PathLike[str], access: MediaAccess, where: str) -> bytes:
    """The bytes of a path, a file: or data: URL, an address, or plain base64. Raises ParameterError."""
    text = os.fspath(source)
    if not isinstance(text, str):
        raise _bad("a path cannot be read", where, type(text).__name__, "a text", "Give the path as a text.")
    scheme = text[:16].partition(":")[0].lower() if ":" in text[:16] else ""
    if scheme == "data":
        return _limited(_data_url(text, where, access.most_bytes), access, where)
    if scheme in ("http", "https"):
        return fetched(text, access.hosts, access.most_bytes, access.timeout_s, where)
    if not access.files:
        raise _bad(
            "pictures and videos are not read from files of this machine",
            where,
            _short(text),
            "a data URL",
            "Send the picture itself: data:image/png;base64,...",
        )
    return _file(Path(unquote(urlsplit(text).path)) if scheme == "file" else Path(text), access, where)


def _file(path: Path, access: MediaAccess, where: str) -> bytes:
    try:
        if access.root is not None:
            root = access.root.resolve()
            path = (root / path).resolve()  # links that lead out of it count where they lead
            if not path.is_relative_to(root):
                raise _bad(
                    "a file is outside the directory that may be read",
                    where,
                    _short(str(path)),
                    "a file below it",
                    "Copy the file there, or send the picture itself: data:image/png;base64,...",
                )
        if not path.is_file():
            raise _bad("there is no such file", where, _short(str(path)), "a file", "Correct the path.")
        size = path.stat().st_size
        if size > access.most_bytes:
            raise _too_large(size, access, where)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ParameterError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise _bad("a file cannot be read", where, f"{_short(str(path))}: {reason}", "a file", "Check the path and its rights.") from error


def _data_url(text: str, where: str, most: int) -> bytes:
    head, comma, body = text.partition(",")
    if not comma:
        raise _bad("a data URL has no data", where, _short(text), "data:image/png;base64,...", "Send the whole URL.")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    return decoded_base64(body, where, most)


def decoded_base64(text: str, where: str, most: int = MOST_BYTES) -> bytes:
    """The bytes of a text in base64, of the usual or the URL alphabet, with or without padding."""
    if len(text) * 3 // 4 > most + 4096:
        raise _too_large(len(text) * 3 // 4, MediaAccess(most_bytes=most), where)
    plain = "".join(unquote(text).split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad("a file is not valid base64", where, _short(text), "base64", "Encode the bytes of the file again.") from error


def _limited(data: bytes, access: MediaAccess, where: str) -> bytes:
    if len(data) > access.most_bytes:
        raise _too_large(len(data), access, where)
    return data


def _too_large(size: int, access: MediaAccess, where: str) -> ParameterError:
    return _bad("a file is too large", where, f"{size} bytes", f"at most {access.most_bytes}", "Save it smaller.")


def _bad(what: str, where: str, got: str, expected: str, fix: str) -> ParameterError:
    return ParameterError(what, parameter="messages", where=where, got=got, expected=expected, fix=fix)


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}...")
