"""qwen-export run"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from qwen_export.commands.output import progress_bar
from qwen_export.commands.speculate import speculate_option
from qwen_export.commands.weight_budget import weight_budget_option
from qwen_export.manifest import load_manifest
from qwen_export.runtimes.backends.integrity import ensure_whole
from qwen_export.runtimes.decoding.generation import SpeculationStatistics, Statistics
from qwen_export.runtimes.model import Generation, Model, Speculate, load
from qwen_export.runtimes.text.reasoning import Reasoning


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="Ask through the chat template; otherwise PROMPT is continued as it stands.")
@click.option("--system", help="System message (implies --chat).")
@click.option("--thinking/--no-thinking", "thinking", default=None, help="Overrides the template's default (implies --chat).")
@click.option(
    "--preserve-thinking", is_flag=True, default=None, help="Keep past reasoning in the prompt, where the template can (implies --chat)."
)
@click.option("--max-new-tokens", type=int, metavar="N", help="Default: until the model stops or the context is full.")
@click.option("--temperature", type=float)
@click.option("--top-p", type=float)
@click.option("--top-k", type=int)
@click.option("--min-p", type=float)
@click.option("--presence-penalty", type=float)
@click.option("--seed", type=int)
@click.option("--greedy", is_flag=True, default=None, help="Always the likeliest token.")
@click.option("--max-context", type=int, metavar="N", help="Overrides the bundle's cache capacity.")
@click.option("--threads", type=int, metavar="N", help="CPU threads; default one per core.")
@click.option("--repack", is_flag=True, help="CPU: copy the weights into the kernels' order: slower load, faster steps.")
@weight_budget_option
@speculate_option
def command(
    bundle: Path,
    prompt: str,
    chat: bool,
    system: str | None,
    thinking: bool | None,
    preserve_thinking: bool | None,
    max_new_tokens: int | None,
    max_context: int | None,
    threads: int | None,
    repack: bool,
    weight_budget: int | None,
    speculate: Speculate,
    **sampling: Any,
) -> None:
    """Stream the BUNDLE's continuation of PROMPT, or its answer with --chat."""
    hash_with_progress(bundle)
    model = load(bundle, max_context=max_context, threads=threads, repack=repack, speculate=speculate, weight_budget=weight_budget)
    given = {name: value for name, value in sampling.items() if value is not None}
    if chat or any(option is not None for option in (system, thinking, preserve_thinking)):
        generation = _answer(model, prompt, system, thinking, preserve_thinking, given, max_new_tokens)
    else:
        params = dataclasses.replace(model.recommended(False), **given)
        generation = model.complete(prompt, sampling=params, max_new_tokens=max_new_tokens)
    try:
        _print(generation)
    finally:
        click.echo(_summary(generation.statistics), err=True)


def _answer(
    model: Model,
    prompt: str,
    system: str | None,
    thinking: bool | None,
    preserve_thinking: bool | None,
    given: dict[str, Any],
    max_new_tokens: int | None,
) -> Generation:
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    thinks = thinking if thinking is not None else model.template.thinks_by_default()
    return model.stream(
        messages,
        enable_thinking=thinking,
        preserve_thinking=preserve_thinking,
        sampling=dataclasses.replace(model.recommended(thinks), **given),
        max_new_tokens=max_new_tokens,
    )


def _print(generation: Generation) -> None:
    """Reasoning dim, the answer plain."""
    reasoning = False
    for event in generation.events():
        if isinstance(event, Reasoning) != reasoning:
            reasoning = not reasoning
            if not reasoning:
                click.echo("\n")
        click.echo(click.style(event.text, dim=True) if reasoning else event.text, nl=False)
    click.echo()


def _summary(s: Statistics) -> str:
    read = f"{s.prompt_tokens} prompt tokens" + (f" ({s.reused_tokens} reused)" if s.reused_tokens else "")
    return (
        f"{read}, first token after {s.first_token_s:.3f} s ({s.prefill_tok_per_s:.0f} tok/s), "
        f"{s.new_tokens} new tokens at {s.decode_tok_per_s:.1f} tok/s, {s.finish or 'context full'}{_drafts(s.speculation)}"
    )


def _drafts(s: SpeculationStatistics) -> str:
    if not sum(s.drafted):
        return ""
    shares = " / ".join(f"{share:.0%}" for share in s.acceptance)
    return (
        f"\n{s.rounds} rounds of {s.tokens_per_round:.2f} tokens, drafts kept {shares}; "
        f"draft {s.draft_s:.2f} s, verify {s.verify_s:.2f} s, host {s.host_s:.2f} s"
    )


def hash_with_progress(bundle: Path) -> None:
    """The first look at a bundle hashes it; show how far that is."""
    manifest = load_manifest(bundle)
    with progress_bar() as bar:
        task = bar.add_task("checking files", total=sum(entry.size for entry in manifest.files.values()))
        ensure_whole(bundle, manifest, lambda name, n: bar.update(task, advance=n))
