"""The native libraries of a bundle: code that runs in this process with all its rights.

Hashes prove that a library is the one that was built into the bundle. They do not prove that its maker can be trusted. A list in the
user's data directory has the hashes of libraries that builds of this user have put into bundles; those are loaded silently. Others are
loaded with a logged notice, unless the caller allows or refuses them explicitly.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from qwen_export.errors import BundleError, ParameterError
from qwen_export.manifest import Manifest

REFUSE, ALLOW = "refuse", "allow"
_LOGGER = logging.getLogger("qwen_export")
_MOST = 10_000  # entries of the list


def check_native(bundle: Path, manifest: Manifest, native: str | None) -> None:
    """Decide about the libraries of a bundle, before any of them is loaded. `native`: "refuse" raises BundleError where there are some,
    "allow" accepts them, None accepts known ones and logs a warning about others."""
    if native not in (None, REFUSE, ALLOW):
        raise ParameterError(
            "the treatment of native libraries is not known",
            parameter="native",
            got=repr(native),
            expected="'refuse', 'allow' or None",
            fix="Leave {native} out for the default.",
        )
    if not manifest.plugins or native == ALLOW:
        return
    if native == REFUSE:
        raise BundleError(
            "the bundle has native code, which is refused",
            where=str(bundle),
            got=", ".join(manifest.plugins),
            fix="Allow it with {native}, or build the checkpoint without the plugin (QWEN_EXPORT_CPU_PLUGIN= set to nothing).",
        )
    for name in manifest.plugins:
        sha256 = manifest.files[name].sha256
        if not is_known(sha256):
            _LOGGER.warning(
                "the bundle %s runs native code that no build of yours made: %s, sha256 %s. Refuse it with native='refuse' (--no-native), "
                "or accept it silently with native='allow' (--native).",
                bundle,
                name,
                sha256[:16],
            )


def is_known(sha256: str) -> bool:
    """Whether a build of this user has put the library into a bundle."""
    return sha256 in _read()


def remember(libraries: Iterable[str]) -> None:
    """Add SHA-256 hashes of libraries to the list. A list that cannot be written stays as it is: its only effect is a notice."""
    path, hashes, new = _list_path(), _read(), set(libraries)
    if path is None or hashes >= new:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps([*sorted(hashes - new)[: _MOST - len(new)], *sorted(new)], indent=1), encoding="utf-8")
        temporary.replace(path)


def _list_path() -> Path | None:
    from platformdirs import user_data_path

    try:
        path = user_data_path("qwen-export", appauthor=False) / "native-libraries.json"
    except RuntimeError:  # a user without a home directory
        return None
    return path if path.is_absolute() else None


def _read() -> set[str]:
    path = _list_path()
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path is not None else []
    except (OSError, ValueError, RecursionError):
        return set()
    return {item for item in value if isinstance(item, str)} if isinstance(value, list) else set()
