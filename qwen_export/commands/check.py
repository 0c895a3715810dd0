"""qwen-export check"""

from __future__ import annotations

from pathlib import Path

import click

from qwen_export.commands.output import progress_bar, size
from qwen_export.errors import BundleError
from qwen_export.manifest import load_manifest
from qwen_export.runtimes.backends.compatibility import check_runnable, free_memory, needed_memory
from qwen_export.runtimes.backends.integrity import ensure_whole


@click.command("check")
@click.argument("bundle", type=click.Path(path_type=Path))
def command(bundle: Path) -> None:
    """Say whether BUNDLE is whole and runs on this machine; if not, what exactly is wrong."""
    manifest = load_manifest(bundle)
    total = sum(entry.size for entry in manifest.files.values())
    with progress_bar() as bar:
        task = bar.add_task("hashing", total=total)
        ensure_whole(bundle, manifest, lambda name, n: bar.update(task, advance=n, description=f"hashing {name}"), again=True)
    click.echo(f"files      {len(manifest.files)} files, {size(total)}, all hashes match")
    if manifest.references:
        outside = sum(reference.size for reference in manifest.references.values())
        click.echo(f"outside    {len(manifest.references)} checkpoint files, {size(outside)}, unchanged since the build")
    click.echo(f"backend    {check_runnable(manifest)}")
    need, have = needed_memory(manifest, bundle), free_memory(manifest)
    if have is not None and need > have:
        raise BundleError(
            "there is too little free memory for the bundle's full context",
            got=size(have),
            expected=f"about {size(need)}",
            fix=f"Load it with a smaller --max-context than {manifest.max_context}, or free memory.",
        )
    click.echo(f"memory     about {size(need)} with {manifest.max_context} tokens" + (f", {size(have)} free" if have is not None else ""))
    verified = manifest.verification
    if verified:
        click.echo(f"verified   {verified.get('when', '')}: {'passed' if verified.get('passed') else 'FAILED'}")
    else:
        click.echo("verified   not yet: run `qwen-export verify` where the checkpoint is")
    click.echo("runnable   yes")
