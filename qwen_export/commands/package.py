"""qwen-export package"""

from __future__ import annotations

from pathlib import Path

import click

from qwen_export.commands.output import notice, size, verbosity_options
from qwen_export.commands.progress import progress
from qwen_export.extras import needed_for
from qwen_export.manifest import load_manifest


@click.command("package")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the new bundle, or the zip file.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--sign", type=click.Path(path_type=Path), metavar="KEY", help="Sign the manifest with this private ed25519 key (PEM).")
@click.option("--windows", is_flag=True, help="A zip file for a Windows machine, with the runtime and a script.")
@click.option("--wheels", is_flag=True, help="With --windows: the wheels too, for a machine without a network.")
@click.option("--python", metavar="VERSION", help="With --windows: the Python that it runs with there, 3.11 to 3.13. Default: 3.12.")
@verbosity_options
def command(bundle: Path, output: Path, force: bool, sign: Path | None, windows: bool, wheels: bool, python: str | None) -> None:
    """Copy BUNDLE, and the weights that it refers to, to a bundle that needs no other files; with --windows make a package for Windows."""
    if (wheels or python) and not windows:
        raise click.UsageError(f"{'--wheels' if wheels else '--python'} goes with --windows")
    if windows and (force or sign):
        raise click.UsageError("--force and --sign are for bundles: remove the zip file, or sign the bundle before it is packaged")
    with needed_for("package"):
        from qwen_export.bundles.packaging import package
        from qwen_export.bundles.packaging_windows import package_windows
    done, total = 0, 2 * sum(entry.size for entry in load_manifest(bundle).files.values())
    with progress() as report:

        def copied(name: str, count: int) -> None:
            nonlocal done
            done += count
            report(name, done, max(done, total))

        if windows:
            package_windows(bundle, output, wheels=wheels, progress=copied, **({} if python is None else {"python": python}))
        else:
            package(bundle, output, force=force, sign=sign, progress=copied)
    made = output.stat().st_size if windows else sum(entry.size for entry in load_manifest(output).files.values())
    notice(f"{output}: {size(made)}")
