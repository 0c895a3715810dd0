"""What an interrupted build had finished, so that the next one continues from there.

One line of JSON per finished tensor: the key of its contents, where it ends in the file, and the SHA-256 of the file up to there. The key
is a hash of all that determines the bytes: the expression, with who searched its scales; the stored tensors that are read for it, with
size and time of their files; the version of this program; and numpy with the instructions that it uses here, whose sums and exponentials
may differ in the last bit. A line counts if its tensor is the one that the new build would write there, and if the file still has that
hash up to its end. So hashing the front of the file once verifies every tensor in it and gives the hash's state to continue with.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np

from qwen_export.graphs.weights.expression import Weight
from qwen_export.graphs.weights.hashed_file import Prefix
from qwen_export.version import __version__

Identity = Callable[[str], str]
"""A text that changes with the contents of a stored tensor, made without reading them."""

_CHUNK = 4 << 20


@dataclass(frozen=True)
class Finished:
    """A tensor in the file: its key, the size of the file with it, the SHA-256 of that much of the file."""

    key: str
    end: int
    sha256: str


class Journal:
    """The lines that belong to a file of weights."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, finished: Finished) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(finished)) + "\n")

    def resume(self, weights: Path, expected: Iterable[tuple[str, int]], progress: Callable[[int], None]) -> tuple[int, Prefix | None]:
        """How many tensors of the build, given as keys and ends in order, are finished in `weights`, and the front of the file that they
        fill. Lines that do not count are dropped. `progress` gets the bytes that were read."""
        usable = []
        for line, (key, end) in zip(self._lines(), expected, strict=False):
            if (line.key, line.end) != (key, end):
                break
            usable.append(line)
        count, prefix = _verified(weights, usable, progress) if usable and weights.exists() else (0, None)
        self._path.write_text("".join(json.dumps(asdict(line)) + "\n" for line in usable[:count]), encoding="utf-8")
        return count, prefix

    def _lines(self) -> list[Finished]:
        """All whole lines; the last may have been cut off."""
        found: list[Finished] = []
        try:
            for text in self._path.read_text(encoding="utf-8").splitlines():
                value = json.loads(text)
                found.append(Finished(str(value["key"]), int(value["end"]), str(value["sha256"])))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return found


def _verified(weights: Path, lines: list[Finished], progress: Callable[[int], None]) -> tuple[int, Prefix | None]:
    digest, size, count, good = hashlib.sha256(), 0, 0, None
    with weights.open("rb", buffering=0) as file:
        buffer = bytearray(_CHUNK)
        for line in lines:
            while size < line.end:
                got = file.readinto(memoryview(buffer)[: min(_CHUNK, line.end - size)])
                if not got:
                    return count, good
                digest.update(memoryview(buffer)[:got])
                size += got
                progress(got)
            if digest.hexdigest() != line.sha256:
                break
            count, good = count + 1, Prefix(size, digest.copy())
    return count, good


def key_of(weight: Weight, identity: Identity) -> str:
    """The key of a tensor's contents. The repr of an expression has everything that it does."""
    digest = hashlib.sha256(f"{__version__}\n{_arithmetic()}\n{weight!r}\n".encode())
    for name in sorted(set(weight.stored())):
        digest.update(f"{name} {identity(name)}\n".encode())
    return digest.hexdigest()


@cache
def _arithmetic() -> str:
    """The version of numpy and the instruction sets that it uses on this machine."""
    try:
        features = import_module("numpy._core._multiarray_umath").__cpu_features__
    except (ImportError, AttributeError):  # numpy 1
        features = {platform.processor(): True}
    return f"numpy {np.__version__} {platform.machine()} {' '.join(sorted(name for name, used in features.items() if used))}"
