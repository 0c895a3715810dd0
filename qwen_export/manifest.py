"""The bundle's manifest: everything a machine must know to run the bundle, and the proof that its files are whole.

A bundle is a directory. `manifest.json` describes it; the other files are listed there with size and SHA-256. Only the standard library
is used, so that the check runs wherever Python does.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from qwen_export.errors import BundleError

SCHEMA_VERSION = 3
OLDEST_SCHEMA = 3
"""Before it a graph had logits [B,N,V], and `logit_rows` counted within a sequence."""
MANIFEST = "manifest.json"
DIMS = ("B", "T", "S", "N", "P")
"""Dynamic dims of a graph: sequences, new tokens, cache slots, rows of logits, pending tokens."""
MODEL_SIZES = ("max_position_embeddings", "num_attention_heads", "vocab_size")
"""Values of the model configuration that runtimes read."""
ROPE_SCALING = "rope_scaling"
"""Key of `source`: the scaling that the build was told, where that is not the one of config.json."""
_CHUNK = 8 << 20

WEIGHTS = "model.weights"
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
    """An input or output of a graph: `shape` has ints and the dynamic dims of DIMS."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


READ_AGAIN = ".read"
"""What the name of an input has behind that of a state whose memory it is, too: for what a call reads of it and does not write."""


@dataclass(frozen=True)
class StateSpec:
    """A tensor that one call leaves for the next: output `after` of a call is input `name` of the next. Zero at the start.

    `grows` is true for attention caches, whose dim S is the capacity and which are written in place. `pending` ones, with a dim P, are
    raw inputs of a speculative call: the next call takes the first `accepted` of them into the recurrent states. `in_place`: output and
    input may be one buffer."""

    name: str
    after: str
    dtype: str
    shape: tuple[int | str, ...]
    grows: bool
    in_place: bool = True

    @property
    def pending(self) -> bool:
        return "P" in self.shape or ".pending_" in self.name


@dataclass(frozen=True)
class WeightSpec:
    """Where a weight of a graph lies: bytes from `offset` of `file`, row-major. Graphs may share weights."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Reference:
    """A file outside the bundle that has weights of it: where it is on this machine, its size in bytes, and when it was last changed, in
    nanoseconds."""

    path: str
    size: int
    modified_ns: int


@dataclass(frozen=True)
class GraphSpec:
    """One compiled graph: its file, its inputs and outputs in order, and its states."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]
    weights: tuple[WeightSpec, ...] = ()


@dataclass(frozen=True)
class SpeculationSpec:
    """At most `max_draft` tokens per call may stay pending. `draft_vocab`: the draft head, graph `mtp`, drafts among the lowest that many
    ids; 0 where there is no head."""

    max_draft: int
    draft_vocab: int


@dataclass(frozen=True)
class RotarySpec:
    """Angle of frequency i at position p is p * inv_freq[i]; cos and sin are multiplied by `scaling`."""

    inv_freq: tuple[float, ...]
    scaling: float


@dataclass(frozen=True)
class TargetSpec:
    """What the bundle was compiled for. `operators` are the non-standard ones that the backend must have, as "domain.Op"; `platform` is the
    system and processor that its plugins are machine code for, "" where there are none."""

    name: str
    device: str
    precision: str
    backend: str
    minimum_backend: str
    operators: tuple[str, ...]
    platform: str = ""


@dataclass(frozen=True)
class EngineSpec:
    """What TensorRT compiled the graphs for: its version, the compute capabilities ("89"), how far beyond these the engines run ("none",
    "ampere+" or "same-sm"), whether later versions of the library run them, and the oldest CUDA that the driver must serve ("13.0").

    `weights`: "bound", the weights of each graph are inputs of its engine, under their names; "embedded", engines have theirs; "stripped",
    they are given to the engine when it is loaded. `onnx`: graphs that the bundle also has as ONNX, in NAME.onnx, for compiling them again
    with `options`. `plugins`: ops that are a plugin of ours in the engines."""

    version: str
    sms: tuple[str, ...]
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    minimum_cuda: str = ""
    weights: str = "bound"
    onnx: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()


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
    references: dict[str, Reference] = field(default_factory=dict)
    """Files outside the bundle, by the name of the note that lies in the bundle in the place of each."""
    plugins: tuple[str, ...] = ()
    """Libraries among the files, with kernels that the graphs use: the runtime loads them into the process."""
    stop_ids: tuple[int, ...] = ()
    precision_plan: dict[str, str] = field(default_factory=dict)
    speculation: SpeculationSpec | None = None
    engine: EngineSpec | None = None
    """Where the graphs are engines of TensorRT."""
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
    try:
        manifest: Manifest = _parse(Manifest, raw)
        _check(manifest)
    except ValueError as error:
        raise BundleError("the manifest has missing or wrong fields", where=str(path), got=error, fix="Copy the bundle again.") from error
    for name in manifest.files:
        file_path(directory, name)
    return manifest


def file_path(bundle: Path, name: str) -> Path:
    """The path of a listed file. Raises BundleError when it would lie outside the bundle."""
    pure = PurePosixPath(name)
    path = bundle / pure
    if pure.is_absolute() or ".." in pure.parts or any(c in name for c in "\\:\0") or not name:
        raise BundleError("the manifest names a file outside the bundle", where=str(bundle), got=repr(name))
    if os.path.exists(path) and not path.resolve().is_relative_to(bundle.resolve()):
        raise BundleError("a file of the bundle is a link to outside", where=str(bundle), got=name)
    return path


def weights_path(bundle: Path, manifest: Manifest, name: str) -> Path:
    """The file with the weights that are listed under this file name, inside the bundle or referred to."""
    return Path(manifest.references[name].path) if name in manifest.references else file_path(bundle, name)


def check_references(bundle: Path, manifest: Manifest) -> None:
    """Every file that the bundle refers to is there as it was when the bundle was built."""
    for reference in manifest.references.values():
        try:
            stat = Path(reference.path).stat()
        except OSError as error:
            raise BundleError(
                "a checkpoint file that the bundle refers to cannot be found",
                where=str(bundle),
                got=f"{reference.path}: {error.strerror}",
                fix="Put it back, or build again; `qwen-export package` makes a bundle that needs no other files.",
            ) from error
        if (stat.st_size, stat.st_mtime_ns) != (reference.size, reference.modified_ns):
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
        raise BundleError("a file of the bundle cannot be read", where=str(path), got=error.strerror) from error
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


def _parse(kind: Any, value: Any, where: str = "") -> Any:
    """`value`, parsed JSON, as the type `kind`: a dataclass, tuple, dict, union or plain type. Raises ValueError with the place that is
    wrong. Unknown fields are left out: a newer minor version may add some."""
    if kind is Any:
        return value
    if isinstance(kind, type) and is_dataclass(kind):
        given, hints = _expect(dict, value, where), get_type_hints(kind)
        missing = [f.name for f in fields(kind) if f.name not in given and f.default is MISSING and f.default_factory is MISSING]
        if missing:
            raise ValueError(f"{where or 'the manifest'} has no {missing[0]}")
        return kind(
            **{f.name: _parse(hints[f.name], given[f.name], f"{where}.{f.name}".lstrip(".")) for f in fields(kind) if f.name in given}
        )
    container, arguments = get_origin(kind), get_args(kind)
    if container is tuple:
        return tuple(_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(_expect(list, value, where)))
    if container is dict:
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in _expect(dict, value, where).items()}
    if container is UnionType:
        if value is None and NoneType in arguments:
            return None
        return _parse(next((option for option in arguments if type(value) is option), arguments[0]), value, where)
    if kind is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{where} is not a number")
        return float(value)
    if type(_expect(kind, value, where)) is int and value < 0:
        raise ValueError(f"{where} is negative")
    return value


def _expect(kind: type, value: Any, where: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{where or 'the manifest'} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _check(manifest: Manifest) -> None:
    """What the types do not say but a runtime relies on. Raises ValueError."""
    if "decoder" not in manifest.graphs:
        raise ValueError("graphs has no decoder")
    for name in MODEL_SIZES:
        if type(manifest.model.get(name)) is not int or manifest.model[name] < 1:
            raise ValueError(f"model.{name} is not a positive number")
    for name in manifest.plugins:
        if name not in manifest.files:
            raise ValueError(f"the plugin is not listed: {name}")
    for name in manifest.engine.onnx if manifest.engine is not None else ():
        if name not in manifest.graphs or f"{name}.onnx" not in manifest.files:
            raise ValueError(f"the ONNX of graph {name} is not listed")
    for name, graph in manifest.graphs.items():
        if graph.file not in manifest.files:
            raise ValueError(f"the file of graph {name} is not listed: {graph.file}")
        inputs, outputs = {t.name for t in graph.inputs}, {t.name for t in graph.outputs}
        shapes = {t.name: t.shape for t in (*graph.inputs, *graph.outputs)} | {s.name: s.shape for s in graph.states}
        for tensor, shape in shapes.items():
            unknown = [dim for dim in shape if isinstance(dim, str) and dim not in DIMS]
            if unknown:
                raise ValueError(f"graph {name}, tensor {tensor}: unknown dim {unknown[0]}")
        for state in graph.states:
            if state.name not in inputs or state.after not in outputs:
                raise ValueError(f"graph {name}: state {state.name} is not an input with an output {state.after}")
        for weight in graph.weights:
            if weight.file not in manifest.files:
                raise ValueError(f"graph {name}: the file of weight {weight.name} is not listed: {weight.file}")
