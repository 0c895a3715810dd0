"""qwen-export check"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qwen_export.commands.flags import flag
from qwen_export.commands.hashing import hash_with_progress
from qwen_export.commands.load_options import load_options
from qwen_export.commands.output import verbosity_options
from qwen_export.errors import QwenExportError
from qwen_export.extras import needed_for


@click.command("check")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), metavar="FILE", help="Public ed25519 key (PEM) that must have signed the manifest.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@load_options(speed=False)
@verbosity_options
def command(bundle: Path, key: Path | None, as_json: bool, loading: dict[str, Any]) -> None:
    """Say whether BUNDLE is whole and runs on this machine; if not, what exactly is wrong."""
    with needed_for("check"):
        from qwen_export.commands.bundle_check import check_bundle

    manifest = hash_with_progress(bundle, again=True)
    result: dict[str, Any] = {}
    try:
        # A line for each part as soon as it is checked: where one fails, those before it are known to be right.
        for found in check_bundle(bundle, manifest, key=key, **loading):
            result[found.part] = found.facts
            if not as_json:
                click.echo(f"{found.part:10} {found.text}")
    except QwenExportError as error:
        if as_json:
            click.echo(json.dumps(result | {"runnable": False, "error": error.text(flag)}, indent=1))
        raise
    click.echo(json.dumps(result | {"runnable": True}, indent=1) if as_json else "runnable   yes")
