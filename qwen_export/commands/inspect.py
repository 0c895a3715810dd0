"""qwen-export inspect"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qwen_export.bundles.bundle_summary import inspect_bundle, is_bundle
from qwen_export.commands.bundle_text import bundle_text
from qwen_export.commands.calibration_flag import calibration_option
from qwen_export.commands.device_memory_flag import device_memory_option
from qwen_export.commands.engine_flags import compute_capabilities
from qwen_export.commands.hub_flags import hub_options
from qwen_export.commands.output import count, mixers, size, verbosity_options
from qwen_export.commands.stage_text import stage_summary
from qwen_export.downloads.hub_options import HubOptions
from qwen_export.extras import needed_for
from qwen_export.targets import TARGETS


@click.command("inspect")
@click.argument("path", metavar="CHECKPOINT|BUNDLE", type=click.Path(path_type=Path))
@click.option("--target", multiple=True, type=click.Choice(list(TARGETS)), help="Only this target; may be given several times.")
@click.option("--sm", metavar="LIST", help="As if engines were built for these compute capabilities, like 86,120.")
@click.option("--rope-scaling", metavar="yarn:FACTOR", help="As if built with this; see `build --help`.")
@calibration_option
@device_memory_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@hub_options
@verbosity_options
def command(
    path: Path,
    target: tuple[str, ...],
    sm: str | None,
    rope_scaling: str | None,
    calibrate: str | None,
    device_memory: int | None,
    as_json: bool,
    hub_access: HubOptions,
) -> None:
    """Say what CHECKPOINT is and what each target can do with it, or what BUNDLE was built for. Reads headers only."""
    bundle = is_bundle(path)
    if bundle and (target or sm or rope_scaling or calibrate or device_memory):
        raise click.UsageError("--target, --sm, --rope-scaling, --calibrate and --device-memory are for checkpoints, and this is a bundle")
    if bundle:
        report = inspect_bundle(path)
    else:
        with needed_for("inspect of a checkpoint"):
            from qwen_export.bundles.inspection import inspect_checkpoint
            from qwen_export.downloads.local_checkpoint import inspected_checkpoint

        with inspected_checkpoint(path, hub_access) as checkpoint:
            report = inspect_checkpoint(checkpoint, rope_scaling, target, compute_capabilities(sm), calibrate, device_memory)
    click.echo(json.dumps(report, indent=1) if as_json else (bundle_text if bundle else _text)(report))


def _text(report: dict[str, Any]) -> str:
    model = report["model"]
    experts = ""
    if model["experts"]:
        selected = f"{model['experts_per_token']} of {model['experts']} experts"
        experts = f", {selected}: {count(model['active_parameters'])} of {count(model['parameters'])} parameters per token"
    lines = [
        f"{report['architecture']}, {model['kind']}, {mixers(model)}{experts}",
        f"hidden {model['hidden_size']}, vocabulary {model['vocab_size']}, context {model['max_context']}, rope {model['rope']}, "
        f"{'tied' if model['tied_head'] else 'separate'} head, quantization {report['quantization']}",
        f"{report['files']} file(s), {size(report['bytes'])}: "
        + ", ".join(f"{name} {count(part['parameters'])}" for name, part in report["parts"].items()),
        *(f"note: {note}" for note in report["notes"]),
        "",
    ]
    for entry in report["targets"]:
        name = f"{entry['target']} {entry['device']} {entry['precision']}"
        if entry["supported"]:
            memory = f"bundle {size(entry['bundle_bytes'])}, run {size(entry['run_bytes'])} at {entry['max_context']} tokens"
            lines.append(f"  yes  {name:24} {memory}")
            lines += [f"{'':32}{count} matrices {what}" for what, count in entry["quantized_matrices"].items()]
            lines += [f"{'':32}{note}" for note in [entry["calibration"]] if note]
            lines += [f"{'':32}{line}" for line in stage_summary(entry["stages"])]
        else:
            lines.append(f"  no   {name:24} {entry['why']}")
    missing = [line for what in ("draft head", "pictures") for line in _without(report["targets"], what)]
    return "\n".join([*lines, *missing])


def _without(targets: list[dict[str, Any]], what: str) -> list[str]:
    """A line for each reason why supported builds have no draft head, or read no pictures."""
    without: dict[str, list[str]] = {}
    supported, key = [entry for entry in targets if entry["supported"]], f"no_{what.replace(' ', '_')}"
    for entry in supported:
        if entry[key]:
            without.setdefault(entry[key], []).append(f"{entry['target']} {entry['device']} {entry['precision']}")
    return [
        f"no {what}: {why}" if len(builds) == len(supported) else f"no {what} on {', '.join(builds)}: {why}"
        for why, builds in without.items()
    ]
