"""qwen-export package"""

from __future__ import annotations

from pathlib import Path

import click

from qwen_export.commands.output import progress_bar, size
from qwen_export.packaging_windows import package_windows


@click.command("package")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The package to write.")
@click.option("--windows", is_flag=True, help="A zip file for a Windows machine, with the runtime and a script.")
@click.option("--wheels", is_flag=True, help="With --windows: the wheels too, for a machine without a network.")
def command(bundle: Path, output: Path, windows: bool, wheels: bool) -> None:
    """Make a package of BUNDLE for another machine."""
    if not windows:
        raise click.UsageError("give --windows")
    with progress_bar() as bar:
        task = bar.add_task("", total=None)
        package_windows(bundle, output, wheels=wheels, progress=lambda name, _: bar.update(task, description=f"{name:.52}"))
    click.echo(f"{output}: {size(output.stat().st_size)}", err=True)
