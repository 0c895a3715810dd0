"""What a bundle's manifest has about the adapters that were merged into it, and whether adapters are still those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_export.errors import VerifyError
from qwen_export.graphs.checkpoint.adapters.adapter_config import ADAPTER
from qwen_export.graphs.checkpoint.adapters.adapter_tensors import WEIGHTS
from qwen_export.graphs.checkpoint.adapters.merge_adapters import AdapterSource
from qwen_export.manifest import hash_file

_FIX = "Give the adapters that the bundle was built with as {lora}, in their order."


def adapter_facts(adapters: Sequence[AdapterSource]) -> list[dict[str, Any]]:
    """Path, scale and the SHA-256 of both files of each adapter."""
    return [{"path": str(adapter.path.absolute()), "scale": adapter.scale, "sha256": _hashes(adapter.path)} for adapter in adapters]


def recorded_adapters(facts: object, given: Sequence[AdapterSource] = ()) -> tuple[AdapterSource, ...]:
    """The adapters of a bundle whose manifest has `facts`: `given`, or those at the paths of the facts where none are given.

    Raises VerifyError where they are not the ones that were merged."""
    entries = [entry for entry in facts if isinstance(entry, Mapping)] if isinstance(facts, list) else []
    adapters = list(given) or [AdapterSource(Path(str(entry.get("path"))), float(entry.get("scale", 1))) for entry in entries]
    if len(adapters) != len(entries):
        raise VerifyError("the bundle was built with another number of adapters", got=len(adapters), expected=len(entries), fix=_FIX)
    for adapter, entry in zip(adapters, entries, strict=True):
        missing = [name for name in (ADAPTER, WEIGHTS) if not (adapter.path / name).is_file()]
        if missing:
            raise VerifyError("an adapter of the bundle is not there", where=str(adapter.path), got=f"no {missing[0]}", fix=_FIX)
        if adapter.scale != entry.get("scale") or _hashes(adapter.path) != entry.get("sha256"):
            raise VerifyError(
                "an adapter is not the one that the bundle was built with", where=str(adapter.path), expected=entry.get("path"), fix=_FIX
            )
    return tuple(adapters)


def _hashes(directory: Path) -> dict[str, str]:
    return {name: hash_file(directory / name).sha256 for name in (ADAPTER, WEIGHTS)}
