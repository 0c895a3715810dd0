"""A bundle's manifest: everything that a machine must know to run the bundle, and the proof that its files are whole.

A bundle is a directory. `manifest.json` describes it; the other files, graphs and weights among them, are listed there with size and
SHA-256. `manifest.sha256` has the SHA-256 of manifest.json itself, in the form of sha256sum, and `manifest.sig` may have a signature.
Only the standard library is used, so that the check runs wherever Python does.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from qwen_export import manifest_checks, manifest_parsing
from qwen_export.errors import BundleError
from qwen_export.long_paths import reachable
from qwen_export.manifest_types import (
    ADAPTERS,
    DIMS,
    MODEL_SIZES,
    OLDEST_SCHEMA,
    READ_AGAIN,
    ROPE_SCALING,
    SCHEMA_VERSION,
    EngineSpec,
    FileEntry,
    GraphSpec,
    Manifest,
    Reference,
    RotarySpec,
    SpeculationSpec,
    StateSpec,
    TargetSpec,
    TensorSpec,
    VisionSpec,
    WeightSpec,
)

__all__ = (
    "ADAPTERS",
    "CALIBRATION",
    "CHAT_TEMPLATE",
    "DIGEST",
    "DIMS",
    "GENERATION_CONFIG",
    "MANIFEST",
    "MODEL_SIZES",
    "OLDEST_SCHEMA",
    "READ_AGAIN",
    "ROPE_SCALING",
    "SCHEMA_VERSION",
    "SIGNATURE",
    "TOKENIZER",
    "TOKENIZER_CONFIG",
    "WEIGHTS",
    "EngineSpec",
    "FileEntry",
    "GraphSpec",
    "Manifest",
    "Reference",
    "RotarySpec",
    "SpeculationSpec",
    "StateSpec",
    "TargetSpec",
    "TensorSpec",
    "VisionSpec",
    "WeightSpec",
    "check_hash",
    "check_references",
    "check_sizes",
    "file_path",
    "hash_file",
    "load_manifest",
    "manifest_digest",
    "weights_path",
    "write_manifest",
)

MANIFEST, DIGEST, SIGNATURE = "manifest.json", "manifest.sha256", "manifest.sig"
_CHUNK = 8 << 20
_LARGEST = 64 << 20
"""Bytes of a manifest. That of a model of 400 billion parameters has some megabytes."""

WEIGHTS = "model.weights"
CALIBRATION = "calibration.json"
TOKENIZER, CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER_CONFIG = (
    "tokenizer.json",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer_config.json",
)


def write_manifest(bundle: Path, manifest: Manifest) -> str:
    """Write manifest.json and its digest; returns the digest. A bundle that is interrupted meanwhile stays whole: until the new manifest
    is there, the digest file accepts the old and the new one. A signature of the old manifest is removed."""
    data = manifest.to_json().encode("utf-8")
    line = f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n"
    old = [f"{found}  {MANIFEST}\n" for found in _stored_digests(bundle)[:1]]
    _replace(bundle / DIGEST, "".join([*old, line]).encode("ascii"))
    _replace(bundle / MANIFEST, data)
    if old:
        _replace(bundle / DIGEST, line.encode("ascii"))
    (bundle / SIGNATURE).unlink(missing_ok=True)
    return line.split()[0]


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def manifest_digest(bundle: Path) -> str:
    """SHA-256 (hex) of manifest.json."""
    return hashlib.sha256(_read(bundle / MANIFEST, _LARGEST)).hexdigest()


def _stored_digests(bundle: Path) -> list[str]:
    path = bundle / DIGEST
    if not path.is_file():
        return []
    lines = _read(path, 4096).decode("ascii", "replace").splitlines()
    return [line.split()[0] for line in lines if line.strip()] or [""]


def _read(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes")
    return data


def load_manifest(bundle: str | Path) -> Manifest:
    """Read a bundle's manifest and check it against its digest, and every field against the others. The other files are not hashed: see
    `runtimes.backends.integrity`. Raises BundleError."""
    directory = reachable(Path(bundle))
    path = directory / MANIFEST
    if not path.is_file():
        raise BundleError("this is not a bundle: it has no manifest.json", where=str(bundle), fix="Make one with `qwen-export build`.")
    try:
        data, digests = _read(path, _LARGEST), _stored_digests(directory)
        raw = manifest_parsing.decode(data)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError("the manifest is not readable", where=str(path), got=error, fix="Copy the bundle again.") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if type(schema) is not int or schema < 1:
        raise BundleError("the manifest has no schema version", where=str(path), fix="Copy the bundle again.")
    if schema > SCHEMA_VERSION:
        raise BundleError(
            "the bundle was made by a newer qwen-export",
            where=str(bundle),
            got=f"schema {schema}",
            expected=f"at most {SCHEMA_VERSION}",
            fix="Update qwen-export on this machine.",
        )
    if schema < OLDEST_SCHEMA:
        raise BundleError(
            "the bundle was made by an older qwen-export, whose graphs have other inputs",
            where=str(bundle),
            got=f"schema {schema}",
            expected=f"at least {OLDEST_SCHEMA}",
            fix="Build it again from its checkpoint.",
        )
    _check_digest(path, hashlib.sha256(data).hexdigest(), digests)
    try:
        manifest = manifest_parsing.parse(raw)
        manifest_checks.check(manifest)
    except (ValueError, RecursionError) as error:
        raise BundleError("the manifest has missing or wrong fields", where=str(path), got=error, fix="Copy the bundle again.") from error
    for name in manifest.files:
        file_path(directory, name)
    return manifest


def _check_digest(path: Path, sha256: str, stored: list[str]) -> None:
    if not stored:
        raise BundleError(
            "the digest of the manifest is missing",
            where=str(path.with_name(DIGEST)),
            fix="Copy the bundle again, with all its files.",
        )
    if sha256 not in stored:
        raise BundleError(
            "the manifest was changed or damaged",
            where=str(path),
            got=f"SHA-256 {sha256[:16]}...",
            expected=f"{stored[-1][:16]}..., as in {DIGEST}",
            fix="Copy the bundle again.",
        )


def file_path(bundle: Path, name: str) -> Path:
    """The path of a listed file. Raises BundleError when it would be outside the bundle."""
    pure, bundle = PurePosixPath(name), reachable(bundle)
    path = bundle / pure
    if pure.is_absolute() or ".." in pure.parts or any(c in name for c in "\\:\0") or not name:
        raise BundleError(
            "the manifest names a file outside the bundle",
            where=str(bundle),
            got=repr(name),
            fix="Do not use the bundle: its maker has made it so.",
        )
    if os.path.exists(path) and not path.resolve().is_relative_to(bundle.resolve()):
        raise BundleError(
            "a file of the bundle is a link to outside", where=str(bundle), got=name, fix="Copy the file that it links to into the bundle."
        )
    return path


def weights_path(bundle: Path, manifest: Manifest, name: str) -> Path:
    """The file with the weights that are listed under this file name, inside the bundle or referred to."""
    return Path(manifest.references[name].path) if name in manifest.references else file_path(bundle, name)


def check_references(bundle: Path, manifest: Manifest) -> None:
    """Every file that the bundle refers to is there as it was when the bundle was built."""
    for reference in manifest.references.values():
        try:
            found = Path(reference.path).stat()
        except (OSError, ValueError) as error:
            raise BundleError(
                "a checkpoint file that the bundle refers to cannot be found",
                where=str(bundle),
                got=f"{reference.path}: {getattr(error, 'strerror', None) or error}",
                fix="Put it back, or build again; `qwen-export package` makes a bundle that needs no other files.",
            ) from error
        if not stat.S_ISREG(found.st_mode) or (found.st_size, found.st_mtime_ns) != (reference.size, reference.modified_ns):
            raise BundleError(
                "a checkpoint file that the bundle refers to was changed since the build",
                where=str(bundle),
                got=reference.path,
                fix="Build the bundle again.",
            )


def check_sizes(bundle: Path, manifest: Manifest) -> None:
    """Every listed file is there with its size, and every file that is referred to."""
    check_references(bundle, manifest)
    for name, entry in manifest.files.items():
        path = file_path(bundle, name)
        if not path.is_file():
            raise BundleError("a file of the bundle is missing", where=str(bundle), got=name, fix="Copy the bundle again.")
        if path.stat().st_size != entry.size:
            raise BundleError(
                "a file of the bundle has the wrong size",
                where=str(path),
                got=f"{path.stat().st_size} bytes",
                expected=f"{entry.size}",
                fix="Copy the bundle again.",
            )


def check_hash(bundle: Path, name: str, entry: FileEntry, progress: Callable[[int], None] | None = None) -> None:
    """Raise BundleError unless the file's SHA-256 is the recorded one. `progress` gets the bytes of each step."""
    path = file_path(bundle, name)
    digest = hashlib.sha256()
    try:
        for chunk in _chunks(path):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    except OSError as error:
        raise BundleError(
            "a file of the bundle cannot be read",
            where=str(path),
            got=error.strerror,
            fix="Check the disk and the permissions of the file.",
        ) from error
    if digest.hexdigest() != entry.sha256:
        raise BundleError(
            "a file of the bundle was changed or damaged",
            where=str(path),
            got=f"SHA-256 {digest.hexdigest()[:16]}...",
            expected=f"{entry.sha256[:16]}...",
            fix="Copy the bundle again.",
        )


def hash_file(path: Path) -> FileEntry:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return FileEntry(path.stat().st_size, digest.hexdigest())


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
