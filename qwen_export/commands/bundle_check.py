"""Everything that a machine can find out about a bundle before it runs it, part by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_export.bundles.signatures import check_signature
from qwen_export.commands.output import size
from qwen_export.commands.stage_check import check_stages
from qwen_export.errors import BundleError
from qwen_export.manifest import Manifest, manifest_digest
from qwen_export.runtimes.backends.compatibility import check_runnable, for_device, for_runtime, free_memory, needed_memory
from qwen_export.runtimes.backends.native_libraries import ALLOW, check_native, is_known
from qwen_export.runtimes.backends.onnxruntime.load_plugins import load_plugins
from qwen_export.runtimes.backends.stage_memory import needed_by_stage
from qwen_export.runtimes.option_checks import check_devices
from qwen_export.runtimes.text_check import check_text


@dataclass(frozen=True)
class Finding:
    """What a check found in one part of the bundle: a line for people, and facts for --json."""

    part: str
    text: str
    facts: Any


def check_bundle(
    bundle: Path,
    manifest: Manifest,
    *,
    key: Path | None = None,
    device: str | None = None,
    runtime: str | None = None,
    device_id: int = 0,
    devices: Sequence[int] = (),
    native: str | None = None,
) -> Iterator[Finding]:
    """Check what `run` needs, of a bundle whose files were hashed. Raises QwenExportError at the first part that does not fit."""
    total = sum(entry.size for entry in manifest.files.values())
    yield Finding("files", f"{len(manifest.files)} files, {size(total)}, all hashes match", {"count": len(manifest.files), "bytes": total})
    digest = manifest_digest(bundle)
    signed = check_signature(bundle, key)
    text = f"sha256 {digest}{', ' + signed if signed else ''}"
    yield Finding("manifest", text, {"sha256": digest, "signature": signed})
    if manifest.references:
        outside = sum(reference.size for reference in manifest.references.values())
        text = f"{len(manifest.references)} checkpoint files, {size(outside)}, unchanged since the build"
        yield Finding("outside", text, {"count": len(manifest.references), "bytes": outside})
    manifest = for_runtime(for_device(manifest, device), runtime)
    check_devices(devices, manifest)
    backend = check_runnable(manifest, devices[0] if devices else device_id)
    yield Finding("backend", backend, backend)
    if manifest.plugins:
        check_native(bundle, manifest, native or ALLOW)  # the line says what a notice would
        load_plugins(bundle, manifest)
        origin = {name: is_known(manifest.files[name].sha256) for name in manifest.plugins}
        lines = ", ".join(f"{name} loads, {'made' if known else 'not made'} by a build of yours" for name, known in origin.items())
        yield Finding("native", lines, origin)
    text = check_text(bundle, manifest.files)
    yield Finding("text", text, text)
    yield _memory(bundle, manifest) if len(needed_by_stage(manifest)) < 2 else _stages(bundle, manifest, devices or (device_id,))
    verified = manifest.verification
    verdict = "passed" if verified.get("passed") is True else "FAILED"
    said = f"{verified.get('when', '')}: {verdict}" if verified else "not yet: run `qwen-export verify` where the checkpoint is"
    yield Finding("verified", said, verified.get("passed"))


def _stages(bundle: Path, manifest: Manifest, devices: Sequence[int]) -> Finding:
    needs, free = check_stages(bundle, manifest, devices)
    parts = [f"{size(need)} on {place}" + (f" ({size(had)} free)" if (had := free[place]) else "") for place, need in needs.items()]
    facts = {"needed": {str(place): need for place, need in needs.items()}, "free": {str(place): had for place, had in free.items()}}
    return Finding("memory", ", ".join(parts), facts)


def _memory(bundle: Path, manifest: Manifest) -> Finding:
    need, have = needed_memory(manifest), free_memory(manifest)
    if have is not None and need > have:
        raise BundleError(
            "there is too little free memory for the bundle's full context",
            where=str(bundle),
            got=size(have),
            expected=f"about {size(need)}",
            fix=f"Load it with a smaller {{max_context}} than {manifest.max_context}, or free memory.",
        )
    free = f", {size(have)} free" if have is not None else ""
    return Finding("memory", f"about {size(need)} with {manifest.max_context} tokens{free}", {"needed": need, "free": have})
