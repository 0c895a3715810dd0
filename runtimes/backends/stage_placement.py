"""Which device each graph of a bundle is loaded on."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_export.bundle_contract import STEP
from qwen_export.manifest import Manifest
from qwen_export.runtimes.memory.device import Device
from qwen_export.stages import stage_groups


def graph_devices(manifest: Manifest, ids: Sequence[int]) -> dict[str, Device]:
    """Stages are spread evenly over the devices of these numbers, in order; all other graphs are where the last stage is."""
    kind = manifest.target.device
    places = {name: Device(kind, ids[-1]) for name in manifest.graphs}
    for names in stage_groups(manifest.graphs).values():
        if len(names) > 1:
            places |= {name: Device(kind, ids[_place(number, len(names), len(ids))]) for number, name in enumerate(names)}
    return places


def stage_devices(manifest: Manifest, ids: Sequence[int]) -> list[Device]:
    """That of each stage of the decoder."""
    places = graph_devices(manifest, ids)
    return [places[name] for name in stage_groups(manifest.graphs)[STEP]]


def shares(needs: Sequence[int], devices: int) -> list[int]:
    """What each of so many devices needs, of stages that need so much."""
    found = [0] * devices
    for number, need in enumerate(needs):
        found[_place(number, len(needs), devices)] += need
    return found


def _place(number: int, stages: int, devices: int) -> int:
    """On which of the devices a stage is."""
    return number * devices // stages
