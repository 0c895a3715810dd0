"""qwen-export package"""

from __future__ import annotations

from pathlib import Path

import click

from qwen_export.commands.output import progress_bar, size
from qwen_export.manifest import load_manifest
from qwen_export.packaging import package


@click.command("package")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the new bundle.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def command(bundle: Path, output: Path, force: bool) -> None:
    """Copy BUNDLE, and the weights that it refers to, to a bundle that needs no other files."""
    with progress_bar() as bar:
        task = bar.add_task("", total=None)
        package(bundle, output, force=force, progress=lambda name, count: bar.update(task, description=f"{name:.52}", advance=count))
    click.echo(f"{output}: {size(sum(entry.size for entry in load_manifest(output).files.values()))}", err=True)
