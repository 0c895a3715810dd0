"""The bundle's manifest: everything a machine must know to run the bundle, and the proof that its files are whole.

A bundle is a directory. `manifest.json` describes it; the other files are listed there with size and SHA-256. Only the standard library
is used, so that the check runs wherever Python does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from qwen_export.errors import BundleError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_CHUNK = 8 << 20

TOKENIZER, CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER_CONFIG = (
    "tokenizer.json",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph: `shape` has ints and the dynamic dims B T S N."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class StateSpec:
    """A tensor that one call leaves for the next: output `after` of a call is input `name` of the next. Zero at the start.

    `grows` is true for attention caches, whose dim S is the capacity and which are written in place."""

    name: str
    after: str
    dtype: str
    shape: tuple[int | str, ...]
    grows: bool


@dataclass(frozen=True)
class GraphSpec:
    """One compiled graph: its file, its inputs and outputs in order, and its states."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]


@dataclass(frozen=True)
class RotarySpec:
    """Angle of frequency i at position p is p * inv_freq[i]; cos and sin are multiplied by `scaling`."""

    inv_freq: tuple[float, ...]
    scaling: float


@dataclass(frozen=True)
class TargetSpec:
    """What the bundle was compiled for. `operators` are the non-standard ones that the backend must have, as "domain.Op"."""

    name: str
    device: str
    precision: str
    backend: str
    minimum_backend: str
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    schema: int
    producer: str
    model: dict[str, Any]
    target: TargetSpec
    max_context: int
    rotary: RotarySpec
    graphs: dict[str, GraphSpec]
    files: dict[str, FileEntry]
    stop_ids: tuple[int, ...] = ()
    precision_plan: dict[str, str] = field(default_factory=dict)
    speculation: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def load_manifest(bundle: str | Path) -> Manifest:
    """Read and validate a bundle's manifest. File contents are not hashed: see `damaged_files`."""
    directory = Path(bundle)
    path = directory / MANIFEST
    if not path.is_file():
        raise BundleError("this is not a bundle: it has no manifest.json", where=str(bundle), fix="Make one with `qwen-export build`.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        schema = raw["schema"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise BundleError("the manifest is not readable", where=str(path), got=str(error), fix="Copy the bundle again.") from error
    if not isinstance(schema, int) or schema > SCHEMA_VERSION:
        raise BundleError(
            "the bundle was made by a newer qwen-export",
            where=str(bundle),
            got=f"schema {schema}",
            expected=f"at most {SCHEMA_VERSION}",
            fix="Update qwen-export on this machine.",
        )
    try:
        manifest = _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError("the manifest has missing or wrong fields", where=str(path), got=str(error), fix="Copy the bundle again.") from error
    for name in manifest.files:
        file_path(directory, name)
    for graph in manifest.graphs.values():
        if graph.file not in manifest.files:
            raise BundleError("a graph's file is not listed in the manifest", where=str(path), got=graph.file)
    return manifest


def file_path(bundle: Path, name: str) -> Path:
    """The path of a listed file. Raises BundleError when it would lie outside the bundle."""
    pure = PurePosixPath(name)
    path = bundle / pure
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or not name:
        raise BundleError("the manifest names a file outside the bundle", where=str(bundle), got=name)
    if path.exists() and not path.resolve().is_relative_to(bundle.resolve()):
        raise BundleError("a file of the bundle is a link to outside", where=str(bundle), got=name)
    return path


def check_sizes(bundle: Path, manifest: Manifest) -> None:
    """Every listed file is there with its size."""
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
    for chunk in _chunks(path):
        digest.update(chunk)
        if progress:
            progress(len(chunk))
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


def _parse(raw: dict[str, Any]) -> Manifest:
    """Unknown fields are left out: a newer minor version may add some."""

    def make(kind: type, data: dict[str, Any]) -> Any:
        known = {f.name for f in fields(kind)}
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known})

    def graph(data: dict[str, Any]) -> GraphSpec:
        return GraphSpec(
            data["file"],
            tuple(make(TensorSpec, t) for t in data["inputs"]),
            tuple(make(TensorSpec, t) for t in data["outputs"]),
            tuple(make(StateSpec, t) for t in data["states"]),
        )

    return make(  # type: ignore[no-any-return]
        Manifest,
        raw
        | {
            "target": make(TargetSpec, raw["target"]),
            "rotary": make(RotarySpec, raw["rotary"]),
            "graphs": {name: graph(data) for name, data in raw["graphs"].items()},
            "files": {name: make(FileEntry, data) for name, data in raw["files"].items()},
        },
    )
