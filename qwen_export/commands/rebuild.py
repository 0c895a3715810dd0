"""qwen-export rebuild"""

from __future__ import annotations

import time
from pathlib import Path

import click

from qwen_export.commands.engine_flags import engine_options
from qwen_export.commands.output import notice, verbosity_options
from qwen_export.engine_options import EngineOptions
from qwen_export.extras import needed_for


@click.command("rebuild")
@click.argument("bundle", type=click.Path(path_type=Path))
@engine_options(rebuilding=True)
@verbosity_options
def command(bundle: Path, engine: EngineOptions) -> None:
    """Compile the engines of BUNDLE again, for this machine's GPU and TensorRT or for those of --sm.

    Needs TensorRT and a bundle that was built with --carry-onnx; neither the checkpoint nor PyTorch."""
    with needed_for("rebuild"):
        from qwen_export.building.engines import rebuild

    started = time.monotonic()
    manifest = rebuild(bundle, engine, lambda graph: notice(f"compiling {graph}"))
    spec = manifest.engine
    if spec is not None:
        found = f"{manifest.target.backend} {spec.version}, SM {', '.join(spec.sms)}"
        notice(f"{bundle}: {found}, in {time.monotonic() - started:.1f} s")
