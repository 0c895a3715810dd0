"""qwen-export chat"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from qwen_export.commands.flags import flag
from qwen_export.commands.generation_flags import sampling_options, template_options
from qwen_export.commands.hashing import hash_with_progress
from qwen_export.commands.load_options import load_options
from qwen_export.commands.media_flags import media_options
from qwen_export.commands.output import detail, notice, verbosity_options
from qwen_export.commands.print_answer import plain_view
from qwen_export.errors import QwenExportError
from qwen_export.extras import needed_for
from qwen_export.terminal.answer_views import AnswerView, MarkdownView
from qwen_export.terminal.chat_loop import converse
from qwen_export.terminal.conversation import Conversation
from qwen_export.terminal.printable import printable
from qwen_export.terminal.questions import HINT, HISTORY, piped_questions, terminal_questions

if TYPE_CHECKING:
    from qwen_export.runtimes.model import Model
    from qwen_export.runtimes.vision.chat_media import MediaOptions

TERMINATED = 143
"""Exit code of shells for a process that SIGTERM has ended."""


@click.command("chat")
@click.argument("bundle", type=click.Path(path_type=Path))
@template_options()
@click.option("--max-new-tokens", type=int, metavar="N", help="Of an answer; default: until the model stops or the context is full.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends an answer; repeatable.")
@sampling_options
@media_options
@click.option("--plain", is_flag=True, help="Show answers as they are written, without Markdown; for screen readers.")
@click.option("--history/--no-history", default=True, help="Keep questions for later conversations, in a file of the user. Default: keep.")
@click.option("--max-context", type=int, metavar="N", help="Overrides the bundle's cache capacity.")
@load_options()
@verbosity_options
def command(
    bundle: Path,
    template: dict[str, Any],
    max_new_tokens: int | None,
    stop: tuple[str, ...],
    sampling: dict[str, Any],
    media: MediaOptions,
    plain: bool,
    history: bool,
    max_context: int | None,
    loading: dict[str, Any],
) -> None:
    """Talk to BUNDLE: type a question, read the answer; /help has the commands of the conversation.

    In a pipe every line is a question, and only answers reach stdout. A backslash at the end of a line goes on in the next one."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with needed_for("chat"):
        from qwen_export.runtimes.model import load

        if interactive:
            import prompt_toolkit  # noqa: F401 - before the bundle is loaded
    hash_with_progress(bundle)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": list(stop) or None, "media": media}
    options |= {name: template[name] for name in ("preserve_thinking", "template_kwargs") if name in template}
    with load(bundle, max_context=max_context, **loading) as model:
        conversation = Conversation(model, sampling, options, template.get("system"), template.get("enable_thinking"))
        model.recommended(False)  # a broken generation_config.json is an error before the first question
        if interactive:
            signal.signal(signal.SIGTERM, _terminate)
            whole = _at_terminal(conversation, bundle, plain, _history_file() if history else None)
        else:
            whole = converse(
                conversation, piped_questions(_lines()), plain_view(), note=notice, summarize=notice, fail=_fail, interactive=False
            )
    sys.exit(0 if whole or interactive else 1)


def _at_terminal(conversation: Conversation, bundle: Path, plain: bool, history: Path | None) -> bool:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    _greet(conversation.model, bundle)
    conversation.model.warm()
    view: AnswerView = MarkdownView(console)
    if plain or console.is_dumb_terminal:
        view = plain_view()

    def note(text: str) -> None:
        console.print(Text(printable(text), style="dim"))

    questions = terminal_questions(conversation, history, note)
    return converse(conversation, questions, view, note=note, summarize=detail, fail=_fail, interactive=True)


def _greet(model: Model, bundle: Path) -> None:
    target = model.manifest.target
    notice(f"{bundle.name}: {target.precision} on {target.device}, context {model.max_context} tokens. {HINT} /help has more.")


def _fail(error: QwenExportError) -> None:
    click.echo(f"error: {printable(error.text(flag))}", err=True)


def _lines() -> Any:
    """Lines of stdin; bytes that are not UTF-8 are replaced, so that one bad line ends nothing."""
    return (line.decode("utf-8", "replace") for line in sys.stdin.buffer)


def _history_file() -> Path:
    from platformdirs import user_state_path

    return user_state_path("qwen-export") / HISTORY


def _terminate(signum: int, frame: Any) -> NoReturn:
    """An interrupt would end an answer only."""
    sys.exit(TERMINATED)
