"""A bundle that needs no other files, from one that may refer to its checkpoint's."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from qwen_export.building.staging import staged_directory
from qwen_export.bundles.signatures import check_key, sign_bundle
from qwen_export.extras import needed_for
from qwen_export.manifest import GraphSpec, Manifest, file_path, hash_file, load_manifest, write_manifest
from qwen_export.runtimes.backends.integrity import ensure_whole

REFERRED = "referred.weights"
"""The file of the new bundle with the weights that were outside the old one."""

Progress = Callable[[str, int], None]
"""Called with a file's name and the bytes just copied or hashed."""


def package(
    bundle: str | Path, output: str | Path, *, force: bool = False, sign: Path | None = None, progress: Progress | None = None
) -> Path:
    """Copy `bundle` to `output`, with the weights it refers to in a file of its own, and return that path. `sign`: a private
    ed25519 key (PEM) that signs the new manifest.

    The bundle is hashed first. Raises QwenExportError; on any failure nothing is left at `output`."""
    say = progress or (lambda name, count: None)
    directory = Path(bundle)
    if sign is not None:
        check_key(sign)
    manifest = load_manifest(directory)
    ensure_whole(directory, manifest, say, again=True)
    with staged_directory(Path(output), replace=force) as staging:
        graphs = {graph.file for graph in manifest.graphs.values()} if manifest.references else set()
        for name, entry in manifest.files.items():
            if name not in manifest.references and name not in graphs:
                shutil.copyfile(file_path(directory, name), staging / name)
                say(name, entry.size)
        if manifest.references:
            manifest = _absorb(directory, manifest, staging, say)
        write_manifest(staging, manifest)
        if sign is not None:
            sign_bundle(staging, sign)
    return Path(output)


def _absorb(directory: Path, manifest: Manifest, staging: Path, say: Progress) -> Manifest:
    """Write the weights that are outside and the graphs that use them; returns the manifest of the result."""
    with needed_for("package of a bundle that refers to its checkpoint"):
        import onnx_ir as ir

        from qwen_export.graphs.weights.copy_referred import copy_referred
    paths = {note: Path(reference.path) for note, reference in manifest.references.items()}
    models = {name: ir.load(file_path(directory, graph.file)) for name, graph in manifest.graphs.items()}
    files = {name: entry for name, entry in manifest.files.items() if name not in manifest.references}
    files[REFERRED], places = copy_referred(list(models.values()), paths, staging / REFERRED, say)
    graphs: dict[str, GraphSpec] = {}
    for name, graph in manifest.graphs.items():
        ir.save(models[name], staging / graph.file)
        files[graph.file] = hash_file(staging / graph.file)
        moved = tuple(
            dataclasses.replace(weight, file=REFERRED, offset=places[weight.file, weight.offset]) if weight.file in paths else weight
            for weight in graph.weights
        )
        graphs[name] = dataclasses.replace(graph, weights=moved)
    return dataclasses.replace(manifest, graphs=graphs, files=files, references={})
