"""The commands of a conversation: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qwen_export.errors import QwenExportError
from qwen_export.terminal.answer_summary import answer_summary
from qwen_export.terminal.conversation import Conversation

KEYS = "Enter sends. Alt-Enter, or a backslash at the end of a line, begins a new line. Ctrl-C ends the answer, Ctrl-D all."


class Leave(Exception):
    """The user ends the conversation."""


class SlashCommand(NamedTuple):
    """`run` gets the conversation and what stands behind the command's name, and gives back what to print."""

    argument: str
    help: str
    run: Callable[[Conversation, str], str]


def is_command(line: str) -> bool:
    """Whether a line is a command and no question: two slashes begin a question with one."""
    return line.startswith("/") and not line.startswith("//")


def run_command(conversation: Conversation, line: str) -> str:
    """Do what a line asks for; returns what to print. Raises QwenExportError where that is not possible, and Leave."""
    name, _, argument = line[1:].strip().partition(" ")
    command = COMMANDS.get(name.lower())
    if command is None:
        raise QwenExportError(
            "there is no such command",
            got=f"/{name}",
            fix="Type /help for all of them, or begin a question that starts with a slash with two.",
        )
    return command.run(conversation, argument.strip())


def _help(conversation: Conversation, argument: str) -> str:
    width = max(len(f"/{name} {command.argument}") for name, command in COMMANDS.items())
    lines = [f"{f'/{name} {command.argument}':{width}}  {command.help}" for name, command in COMMANDS.items()]
    keys = (
        "Enter sends. Alt-Enter, or a backslash at the end of a line, begins a new line. Ctrl-C ends the answer, Ctrl-D the conversation."
    )
    return "\n".join([*lines, keys])


def _think(conversation: Conversation, argument: str) -> str:
    if argument:
        try:
            conversation.thinking = {"on": True, "off": False, "auto": None}[argument.lower()]
        except KeyError:
            raise QwenExportError("there is no such mode", got=argument, expected="on, off or auto", fix="Type /think on.") from None
    if conversation.thinking is None:
        return f"thinking: auto ({'on' if conversation.model.template.thinks_by_default() else 'off'} for this model)"
    return f"thinking: {'on' if conversation.thinking else 'off'}"


def _system(conversation: Conversation, argument: str) -> str:
    if argument:
        conversation.system = None if argument == "-" else argument
    return f"system message: {conversation.system}" if conversation.system else "no system message"


def _save(conversation: Conversation, argument: str) -> str:
    path = _path(argument, "/save conversation.json")
    conversation.save(path)
    return f"saved {_messages(conversation)} to {path}"


def _load(conversation: Conversation, argument: str) -> str:
    path = _path(argument, "/load conversation.json")
    conversation.load(path)
    return f"loaded {_messages(conversation)} from {path}"


def _path(argument: str, example: str) -> Path:
    if not argument:
        raise QwenExportError("the command needs a file name", fix=f"Type {example}.")
    return Path(argument).expanduser()


def _messages(conversation: Conversation) -> str:
    count = len(conversation.all_messages())
    return f"{count} message{'s' * (count != 1)}"


def _stats(conversation: Conversation, argument: str) -> str:
    statistics = conversation.statistics
    if statistics is None:
        return "no answer yet"
    used, of = statistics.prompt_tokens + statistics.new_tokens, conversation.model.max_context
    return f"{answer_summary(statistics)}\ncontext: {used} of {of} tokens"


def _reset(conversation: Conversation, argument: str) -> str:
    conversation.reset()
    return "a new conversation"


def _image(conversation: Conversation, argument: str) -> str:
    return _attach(conversation, "image", _path(argument, "/image photo.jpg"))


def _video(conversation: Conversation, argument: str) -> str:
    return _attach(conversation, "video", _path(argument, "/video clip.mp4"))


def _attach(conversation: Conversation, kind: str, path: Path) -> str:
    if not conversation.sees:
        raise QwenExportError("this bundle takes text only", got=f"/{kind}", fix="Describe what is to be seen in words.")
    if not path.is_file():
        raise QwenExportError("there is no such file", where=str(path), fix="Check the path.")
    conversation.attach(kind, path)
    kinds = {"image": "picture", "video": "video"}
    counts = {name: sum(part["type"] == found for part in conversation.attached) for found, name in kinds.items()}
    listed = " and ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items() if count)
    return f"{listed} for the next question"


def _quit(conversation: Conversation, argument: str) -> str:
    raise Leave


COMMANDS = {
    "think": SlashCommand("on|off|auto", "whether the model reasons before it answers", _think),
    "system": SlashCommand("TEXT", "the system message from now on; `-` removes it, nothing shows it", _system),
    "image": SlashCommand("FILE", "a picture for the next question, where the model reads pictures", _image),
    "video": SlashCommand("FILE", "a video for it", _video),
    "save": SlashCommand("FILE", "write the conversation as JSON", _save),
    "load": SlashCommand("FILE", "go on with a saved conversation", _load),
    "stats": SlashCommand("", "speed of the last answer, and how much of the context is used", _stats),
    "reset": SlashCommand("", "begin again; the settings stay", _reset),
    "help": SlashCommand("", "this list", _help),
    "quit": SlashCommand("", "end, like Ctrl-D", _quit),
}
