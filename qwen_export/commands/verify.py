"""qwen-export verify"""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from qwen_export.errors import VerifyError
from qwen_export.verify import as_lines, dump, verify


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--reference", required=True, type=click.Path(path_type=Path), help="The checkpoint that the bundle was built from.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(bundle: Path, reference: Path, as_json: bool) -> None:
    """Compare BUNDLE with its checkpoint: eager modules, and transformers where installed."""
    with Console(stderr=True).status("loading") as status:
        result = verify(bundle, reference, report=lambda text: status.update(text))
    click.echo(dump(result) if as_json else "\n".join(as_lines(result)))
    if not result["passed"]:
        failed = [check["name"] for check in result["checks"] if not check["passed"]]
        raise VerifyError(
            "the bundle is not the same model as its checkpoint", got=", ".join(failed), fix="Please report this with the output above."
        )
