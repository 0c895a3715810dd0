"""Opening a bundle: everything that can be wrong with it, or with the options, is found before a graph is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen_export.bundle_contract import HEAD_GRAPHS, VERIFY, is_tower
from qwen_export.manifest import Manifest, load_manifest
from qwen_export.runtimes.backends.compatibility import check_limits, check_runnable, for_device, for_runtime
from qwen_export.runtimes.backends.integrity import ensure_whole
from qwen_export.runtimes.backends.native_libraries import check_native
from qwen_export.runtimes.backends.open_graphs import OpenOptions, open_graphs
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.decoding.static_graphs import is_static
from qwen_export.runtimes.option_checks import check_devices, check_speculate, check_weight_budget

Speculate = str | int


def open_bundle(
    directory: Path,
    options: OpenOptions,
    max_context: int | None,
    speculate: Speculate,
    device: str | None,
    runtime: str | None,
    native: str | None,
) -> tuple[Manifest, dict[str, Session]]:
    """The manifest, and sessions of the graphs that are needed. The parameters are those of `load`; raises what that does."""
    manifest = for_runtime(for_device(load_manifest(directory), device), runtime)
    ensure_whole(directory, manifest)
    for number in options.device_ids or (options.device_id,):
        check_runnable(manifest, number)
    check_limits(manifest, max_context, options.threads)
    check_native(directory, manifest, native)
    check_speculate(speculate, manifest)
    check_weight_budget(options.weight_budget, manifest)
    check_devices(options.device_ids, manifest)
    # ONNX Runtime multiplies with blocks of codes fast only in an order of its own.
    static = is_static(manifest)
    repack = options.repack or (static and manifest.target.precision.startswith("int"))
    idle = HEAD_GRAPHS if speculate in ("off", "lookup") else ()
    later = (*filter(is_tower, manifest.graphs), *((VERIFY,) if speculate == "off" else ()))
    return manifest, open_graphs(
        directory,
        manifest,
        replace(options, repack=repack, packed_once=repack and static, later=later, context=max_context),
        [name for name in manifest.graphs if name not in idle],
    )
