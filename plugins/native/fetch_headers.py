"""Print the folder of ONNX Runtime's C headers, which the libraries here are compiled with and which Python's package of it does not bring.

    export ORT_INCLUDE_DIR=$(python plugins/native/fetch_headers.py)

Takes ORT_INCLUDE_DIR, else the system's headers, else those of Debian's package, downloaded once into build/ if its hash is the known one.
Newer runtimes accept libraries built with older headers. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
import urllib.request
from pathlib import Path

HEADER = "onnxruntime_cxx_api.h"
SYSTEM = Path("/usr/include/onnxruntime")
DOWNLOADED = Path(__file__).resolve().parents[2] / "build" / "onnxruntime-headers"

_PACKAGE = "pool/main/o/onnxruntime/libonnxruntime-dev_1.21.0+dfsg-1_amd64.deb"
# The mirror drops old versions one day, the archive never does. Headers are the same on every processor.
SOURCES = (f"http://deb.debian.org/debian/{_PACKAGE}", f"https://snapshot.debian.org/archive/debian/20250601T000000Z/{_PACKAGE}")
SHA256 = "14f7d959d5deacbcf1504830d4189f91fc67382b399ed9ae9d3aa9c4050ced08"
_INSIDE = "/usr/include/onnxruntime/"
_SECONDS = 20


def headers() -> Path:
    """Raises OSError, with a sentence, when they cannot be had."""
    given = os.environ.get("ORT_INCLUDE_DIR")
    if given:
        if not (Path(given) / HEADER).is_file():
            raise OSError(f"ORT_INCLUDE_DIR is {given}, and there is no {HEADER}")
        return Path(given)
    for folder in (SYSTEM, DOWNLOADED):
        if (folder / HEADER).is_file():
            return folder
    unpack(download(), DOWNLOADED)
    return DOWNLOADED


def download() -> bytes:
    """The Debian package. What has another hash is not looked at."""
    reasons = []
    for source in SOURCES:
        try:
            with urllib.request.urlopen(source, timeout=_SECONDS) as answer:
                package: bytes = answer.read()
        except OSError as error:
            reasons.append(f"{source}: {error}")
            continue
        if hashlib.sha256(package).hexdigest() == SHA256:
            return package
        reasons.append(f"{source}: another file than expected")
    raise OSError(f"the headers of ONNX Runtime could not be downloaded ({'; '.join(reasons)}); set ORT_INCLUDE_DIR")


def unpack(package: bytes, folder: Path) -> None:
    """Put the headers of a Debian package into `folder`."""
    with tarfile.open(fileobj=io.BytesIO(member(package, "data.tar.xz"))) as archive:
        found = {
            entry.name.partition(_INSIDE)[2]: archive.extractfile(entry) for entry in archive if entry.isfile() and _INSIDE in entry.name
        }
        for name, file in found.items():
            # The name must be there last: a folder with it is complete.
            if file is not None and "/" not in name and name != HEADER:
                _write(folder / name, file.read())
        last = found.get(HEADER)
        if last is None:
            raise OSError(f"the package has no {HEADER}")
        _write(folder / HEADER, last.read())


def member(archive: bytes, name: str) -> bytes:
    """One file of an `ar` archive: after its 8-byte mark, entries of a 60-byte text header (name 16, ..., size at 48..57) and their bytes,
    at even offsets."""
    at = 8
    while at + 60 <= len(archive):
        header = archive[at : at + 60]
        size = int(header[48:58])
        if header[:16].decode().rstrip().rstrip("/") == name:
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise OSError(f"the package has no {name}")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


if __name__ == "__main__":
    try:
        print(headers())
    except OSError as error:
        sys.exit(f"error: {error}")
