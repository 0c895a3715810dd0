"""qwen-export package"""

from __future__ import annotations

from pathlib import Path

import click

from qwen_export.bundles.packaging import package
from qwen_export.bundles.packaging_windows import package_windows
from qwen_export.commands.output import progress_bar, size
from qwen_export.manifest import load_manifest


@click.command("package")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the new bundle, or the zip file.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--windows", is_flag=True, help="A zip file for a Windows machine, with the runtime and a script.")
@click.option("--wheels", is_flag=True, help="With --windows: the wheels too, for a machine without a network.")
def command(bundle: Path, output: Path, force: bool, windows: bool, wheels: bool) -> None:
    """Copy BUNDLE, and the weights that it refers to, to a bundle that needs no other files; with --windows make a package for Windows."""
    if wheels and not windows:
        raise click.UsageError("--wheels goes with --windows")
    if force and windows:
        raise click.UsageError("--force is for bundles; remove the zip file")
    with progress_bar() as bar:
        task = bar.add_task("", total=None)

        def progress(name: str, count: int) -> None:
            bar.update(task, description=f"{name:.52}", advance=count)

        if windows:
            package_windows(bundle, output, wheels=wheels, progress=progress)
        else:
            package(bundle, output, force=force, progress=progress)
    total = output.stat().st_size if windows else sum(entry.size for entry in load_manifest(output).files.values())
    click.echo(f"{output}: {size(total)}", err=True)
