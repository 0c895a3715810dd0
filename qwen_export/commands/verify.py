"""qwen-export verify"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qwen_export.commands.hub_flags import hub_options
from qwen_export.commands.load_options import load_options
from qwen_export.commands.output import verbosity_options
from qwen_export.commands.progress import progress
from qwen_export.downloads.hub_options import HubOptions
from qwen_export.errors import VerifyError
from qwen_export.extras import needed_for

_REPORT = "Please report this with the output above."


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--reference", required=True, type=click.Path(path_type=Path), help="The checkpoint that the bundle was built from.")
@click.option("--per-layer", is_flag=True, help="Compare layer by layer instead, to see where they part and how large values become.")
@click.option("--lora", multiple=True, metavar="DIR[:SCALE]", help="Where an adapter of the bundle is now; default: where it was.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@hub_options
@load_options(speed=False)
@verbosity_options
def command(
    bundle: Path,
    reference: Path,
    per_layer: bool,
    lora: tuple[str, ...],
    as_json: bool,
    hub_access: HubOptions,
    loading: dict[str, Any],
) -> None:
    """Compare BUNDLE with its checkpoint: eager modules, and transformers where installed."""
    loading["lora"] = lora
    with needed_for("verify"):
        from qwen_export.downloads.local_checkpoint import local_checkpoint
    reference = local_checkpoint(reference, hub_access)
    if per_layer:
        _layers(bundle, reference, as_json, loading)
        return
    with needed_for("verify"):
        from qwen_export.verification.logit_check import as_lines, dump, verify
    with progress("") as report:
        result = verify(bundle, reference, report=report, **loading)
    click.echo(dump(result) if as_json else "\n".join(as_lines(result)))
    if not result["passed"]:
        failed = [check["name"] for check in result["checks"] if not check["passed"]]
        raise VerifyError(
            "the bundle is not the same model as its checkpoint", got=", ".join(failed), fix="See where with {per_layer}. " + _REPORT
        )


def _layers(bundle: Path, reference: Path, as_json: bool, loading: dict[str, Any]) -> None:
    with needed_for("verify --per-layer"):
        from qwen_export.commands.layer_table import print_layers
        from qwen_export.verification.layer_check import verify_layers
        from qwen_export.verification.logit_check import dump

    with progress("") as report:
        result = verify_layers(bundle, reference, report=report, **loading)
    if as_json:
        click.echo(dump(result))
    else:
        print_layers(result)
    if not result["passed"]:
        first = next(row for row in result["layers"] if row["passed"] is False)
        raise VerifyError(
            "the bundle differs from its checkpoint",
            where=first["name"] + (f", {first['origin']}" if first["origin"] else ""),
            got=first["note"] if first["error"] is None else f"an error of {first['error']:.1e}",
            expected="" if first["error"] is None else f"at most {result['tolerance']:.1e}",
            fix="Build in fp32 or bf16: the largest value of fp16 is 65504." if first["error"] is None and result["warnings"] else _REPORT,
        )
