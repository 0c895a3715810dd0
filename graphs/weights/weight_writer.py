"""Writing all weights of a bundle's graphs to one external-data file, in order, without ever holding more than a few blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qwen_export.graphs.weights.expression import FirstRows, LastRows, TensorSource, Weight, weight_of
from qwen_export.graphs.weights.hashed_file import HashedFile, Prefix
from qwen_export.graphs.weights.journal import Finished, Identity, Journal, key_of
from qwen_export.graphs.weights.read_ahead import BUDGET_BYTES, ReadAhead
from qwen_export.manifest import FileEntry

# Page alignment lets a runtime map each tensor straight from the file.
ALIGNMENT = 4096

Progress = Callable[[str, int], None]
"""Called with the tensor's name and the bytes just written."""


@dataclass(frozen=True)
class Resume:
    """Where finished tensors are noted, and a text that changes with the contents of stored ones."""

    journal: Journal
    identity: Identity


def weight_bytes(models: Sequence[ir.Model]) -> int:
    """Size of the file that `write_weights` will make of the lazy weights, without padding."""
    return sum(weight.nbytes for weight in distinct_weights(models))


def write_weights(
    models: Sequence[ir.Model],
    source: TensorSource,
    path: Path,
    progress: Progress | None = None,
    *,
    jobs: int | None = None,
    budget: int = BUDGET_BYTES,
    resume: Resume | None = None,
) -> FileEntry:
    """Evaluate every lazy weight of the graphs into `path`, equal ones once, and turn them into external data there. Returns size and
    SHA-256.

    `jobs` threads make blocks ahead of the writer, by default one per core; those blocks hold at most `budget` bytes, or one that is
    larger. With `resume`, tensors that an earlier run finished in `path` stay."""
    report = progress or (lambda name, count: None)
    places = _places(models)
    done, prefix = _finished(places, path, resume, lambda count: report("checking finished tensors", count))
    with HashedFile(path, prefix) as file, ReadAhead(source, jobs or os.cpu_count() or 1, budget) as pipeline:
        pending = iter(places[done:])
        place: _Place | None = None
        for block in pipeline.blocks(place.weight for place in places[done:]):
            if place is None:
                place = next(pending)
                file.write(memoryview(bytes(place.begin - file.size)))
            file.write(block.data)
            report(place.name, block.data.nbytes)
            if block.last:
                if file.size != place.end:
                    raise AssertionError(f"weight {place.name} wrote {file.size - place.begin} bytes of {place.weight.nbytes}")
                if resume:
                    _note(file, place, resume)
                place = None
    begins = {place.weight: place.begin for place in places}
    for value, weight in lazy_weights(models):
        value.const_value = external(path, begins[_whole(weight)] + _offset(weight), weight, value.name or "")
    return file.entry


def external(path: Path, begin: int, weight: Weight, name: str) -> ir.ExternalTensor:
    """A weight in the file `path`, from byte `begin`."""
    return ir.ExternalTensor(path.name, begin, weight.nbytes, weight.dtype, name=name, shape=ir.Shape(weight.shape), base_dir=path.parent)


def lazy_weights(models: Sequence[ir.Model]) -> list[tuple[ir.Value, Weight]]:
    """The values whose weights are not written yet."""
    values = (value for model in models for value in model.graph.initializers.values())
    return [(value, weight) for value in values if (weight := weight_of(value)) is not None]


def distinct_weights(models: Sequence[ir.Model]) -> dict[Weight, str]:
    """What is stored for the lazy weights, in order, with the name of the first value that it is for."""
    found: dict[Weight, str] = {}
    for value, weight in lazy_weights(models):
        found.setdefault(_whole(weight), value.name or "")
    return found


def _whole(weight: Weight) -> Weight:
    """What is stored for a weight: rows at an end of another are read from its bytes."""
    return weight.of if isinstance(weight, FirstRows | LastRows) else weight


def _offset(weight: Weight) -> int:
    """Where in what is stored for it a weight begins, in bytes."""
    return weight.of.nbytes - weight.nbytes if isinstance(weight, LastRows) else 0


@dataclass(frozen=True)
class _Place:
    """Where a weight is stored in the file, in bytes."""

    name: str
    weight: Weight
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.weight.nbytes


def _places(models: Sequence[ir.Model]) -> list[_Place]:
    places, end = [], 0
    for weight, name in distinct_weights(models).items():
        begin = end + -end % ALIGNMENT
        places.append(_Place(name, weight, begin))
        end = begin + weight.nbytes
    return places


def _finished(places: list[_Place], path: Path, resume: Resume | None, progress: Callable[[int], None]) -> tuple[int, Prefix | None]:
    if resume is None:
        return 0, None
    expected = ((key_of(place.weight, resume.identity), place.end) for place in places)
    done, prefix = resume.journal.resume(path, expected, progress)
    if prefix is None:
        path.unlink(missing_ok=True)
    return done, prefix


def _note(file: HashedFile, place: _Place, resume: Resume) -> None:
    key = key_of(place.weight, resume.identity)
    file.mark(lambda end, sha256: resume.journal.append(Finished(key, end, sha256)))
