"""A loadable `libtensorrt_rtx.so`, which the parser loads by this name when it creates a plugin.

The wheels have `libtensorrt_rtx.so.1` only, and without the other name the parser ends the process. So a library of that name is loaded
that has nothing but a dependency: looking a symbol up in it finds those of the real one. It is the smallest ELF file that the loader takes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import tempfile
from functools import cache
from itertools import accumulate
from pathlib import Path

from qwen_export.errors import UnsupportedError

_PLAIN, _REAL = "libtensorrt_rtx.so", "libtensorrt_rtx.so.1"
_PAGE, _HEADER, _PROGRAM_HEADER = 0x1000, 64, 56
_LOAD, _DYNAMIC, _GNU_STACK = 1, 2, 0x6474E551
_READ_WRITE = 6
_NEEDED, _HASH, _STRTAB, _SYMTAB, _STRSZ, _SYMENT, _SONAME = 1, 4, 5, 6, 10, 11, 14
MACHINES = {"x86_64": 62, "aarch64": 183}


@cache
def ensure_plain_name() -> None:
    """Load the alias into this process, unless the name can be loaded. Where neither is possible, UnsupportedError."""
    if sys.platform == "win32":
        return
    try:
        ctypes.CDLL(_PLAIN)
        return
    except OSError:
        pass
    fix = f"Put a link {_PLAIN} to {_REAL} into a directory that LD_LIBRARY_PATH names."
    if platform.machine() not in MACHINES:
        raise UnsupportedError(f"the parser needs {_PLAIN}", got=f"no alias for {platform.machine()}", fix=fix)
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / _PLAIN
            path.write_bytes(alias(_PLAIN, _REAL, MACHINES[platform.machine()]))
            ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_GLOBAL)
    except OSError as error:  # no directory to write to, or the system forbids loading from it
        raise UnsupportedError(f"the parser needs {_PLAIN}", got=error, fix=fix) from error


def alias(name: str, needed: str, machine: int) -> bytes:
    """A 64-bit ELF library called `name` that needs the library `needed` and has no symbols."""
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    symbols, hashes = bytes(24), struct.pack("<5I", 1, 1, 0, 0, 0)  # the null symbol; one bucket and one chain, both empty
    parts = [strings.ljust(-(-len(strings) // 8) * 8, b"\0"), symbols, hashes.ljust(24, b"\0")]
    start = _HEADER + 3 * _PROGRAM_HEADER
    at_strings, at_symbols, at_hashes, at_dynamic = accumulate(map(len, parts), initial=start)
    entries = (
        (_NEEDED, 2 + len(name)),
        (_SONAME, 1),
        (_HASH, at_hashes),
        (_STRTAB, at_strings),
        (_SYMTAB, at_symbols),
        (_STRSZ, len(strings)),
        (_SYMENT, len(symbols)),
        (0, 0),
    )
    dynamic = b"".join(struct.pack("<2Q", *entry) for entry in entries)
    size = at_dynamic + len(dynamic)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<2HI3QI6H", 3, machine, 1, 0, _HEADER, 0, 0, _HEADER, _PROGRAM_HEADER, 3, 64, 0, 0)
    programs = b"".join(
        struct.pack("<2I6Q", kind, _READ_WRITE, offset, offset, offset, length, length, align)
        for kind, offset, length, align in (
            (_LOAD, 0, size, _PAGE),
            (_DYNAMIC, at_dynamic, len(dynamic), 8),
            (_GNU_STACK, 0, 0, 16),
        )
    )
    return header + programs + b"".join(parts) + dynamic
