"""Every command that a document shows is one that the command line takes, and every script exists with its options."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import click
import pytest

from qwen_export.commands.cli import COMMANDS, group
from qwen_export.commands.examples import EXAMPLES
from tests.support.documented_commands import ROOT, DocumentedCommand, documented_commands, pages, write_readers_files

DOCUMENTED = documented_commands()
SCRIPTS = re.compile(r"^(benchmarks|examples|tests)[./].*")


def shown(command: DocumentedCommand) -> str:
    return f"{command.page}: {command.text}"[:120]


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    write_readers_files(folder)
    return folder


@pytest.mark.parametrize("command", [command for command in DOCUMENTED if command.ours], ids=shown)
def test_the_command_line_takes_it(command: DocumentedCommand, readers_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(readers_folder)
    for arguments in command.ours:
        parent = click.Context(group, info_name="qwen-export")
        if arguments[0].startswith("-"):
            group.make_context("qwen-export", arguments, resilient_parsing=True)
            continue
        found = group.get_command(parent, arguments[0])
        assert found is not None, f"there is no command {arguments[0]}"
        found.make_context(arguments[0], arguments[1:], parent=parent)


def scripts(command: DocumentedCommand) -> list[tuple[Path, list[str]]]:
    """Scripts of this repository that a line runs with Python, and their options."""
    found = []
    for call in command.calls:
        words = [word for word in call if "=" not in word or word.startswith("-")]
        if not words or not words[0].startswith("python"):
            continue
        rest = words[2:] if words[1] == "-m" else words[1:]
        if SCRIPTS.match(rest[0]):
            path = ROOT / (rest[0].replace(".", "/") + ".py" if words[1] == "-m" else rest[0])
            found.append((path, [word.split("=")[0] for word in rest[1:] if word.startswith("--")]))
    return found


@pytest.mark.parametrize("command", [command for command in DOCUMENTED if scripts(command)], ids=shown)
def test_its_script_has_the_options(command: DocumentedCommand) -> None:
    for path, options in scripts(command):
        source = path.read_text(encoding="utf-8")
        missing = [option for option in options if f'"{option}"' not in source]
        assert not missing, f"{path.relative_to(ROOT)} has no {', '.join(missing)}"


def test_every_command_has_examples_and_a_page() -> None:
    assert set(EXAMPLES) == set(COMMANDS)
    used = {name for command in DOCUMENTED if command.page != "--help" for name in re.findall(r"qwen-export (\w+)", command.text)}
    assert set(COMMANDS) <= used, "commands that no document shows"


def test_commands_stand_in_blocks_that_are_marked() -> None:
    """A block without a language, or an indented one, would not be checked."""
    strays = []
    for page in pages():
        inside = None
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            if line.lstrip().startswith("```"):
                inside = None if inside is not None else line.strip().removeprefix("```")
            elif re.match(r"\s*(\$ )?qwen-export [a-z]", line) and (inside == "" or (inside is None and line.startswith("    "))):
                strays.append(f"{page.relative_to(ROOT)}:{number}")
    assert not strays


def test_extras_that_are_installed_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    texts = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in pages()}
    named = {
        (name, extra)
        for name, text in texts.items()
        for found in re.findall(r"\.(?:whl\)\")?\[([a-z,-]+)\]", text)
        for extra in found.split(",")
    }
    assert named and not [pair for pair in named if pair[1] not in extras]
    assert not [name for name, text in texts.items() if re.search(r"pip install '?qwen-export", text)], "no package index has it"
