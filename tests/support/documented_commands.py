"""Commands that the documents show: the lines of blocks that are marked `sh`, and the examples under the help of the command line."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from qwen_export.commands.examples import EXAMPLES
from tests.support.pictures import encoded, photo
from tests.support.videos import video

ROOT = Path(__file__).parents[2]
REQUEST = {
    "custom_id": "1",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4},
}
_BLOCK = re.compile(r"^( *)```sh\b[^\n]*\n(.*?)^\1```", re.M | re.S)
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
_BORDERS = {"|", "&&", ";", "||", "&", ">", "<", "2>"}


@dataclass(frozen=True)
class DocumentedCommand:
    page: str
    """Path of the document in the repository, or `--help` for the examples of the command line."""
    text: str
    """A line as it is shown; lines that a backslash joins are one."""

    @property
    def calls(self) -> list[list[str]]:
        """The words of each program that the line starts, without comments and redirections: a pipe has several."""
        calls: list[list[str]] = [[]]
        lexer = shlex.shlex(self.text, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = list(lexer)
        for index, word in enumerate(words):
            if word in _BORDERS:
                calls.append([])
            elif index == 0 or words[index - 1] not in (">", "<", "2>"):
                calls[-1].append(word)
        return [call for call in calls if call]

    @property
    def ours(self) -> list[list[str]]:
        """The arguments of each call of qwen-export in the line."""
        return [call[call.index("qwen-export") + 1 :] for call in self.calls if "qwen-export" in call[:2]]


def pages() -> list[Path]:
    """The documents for users, README first."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("README.md"))]


def commands_of(page: Path) -> list[DocumentedCommand]:
    name = page.relative_to(ROOT).as_posix()
    lines = [line for _, block in _BLOCK.findall(page.read_text(encoding="utf-8")) for line in block.replace("\\\n", " ").splitlines()]
    return [DocumentedCommand(name, line.strip()) for line in lines if line.strip() and not line.strip().startswith("#")]


def python_of(page: Path) -> str:
    """The Python blocks of a page, which its reader types one after the other."""
    return "\n".join(_PYTHON.findall(page.read_text(encoding="utf-8")))


def help_examples() -> list[DocumentedCommand]:
    return [DocumentedCommand("--help", line) for examples in EXAMPLES.values() for line, _ in examples]


def write_readers_files(folder: Path) -> None:
    """What pages take for granted beside a checkpoint: a picture, a video, a text, requests, keys, a precision plan."""
    (folder / "photo.png").write_bytes(encoded(photo(64, 96)))
    (folder / "clip.mp4").write_bytes(video(8))
    (folder / "letters.txt").write_text("a b c d e f g h\n" * 100, encoding="utf-8")
    (folder / "requests.jsonl").write_text(json.dumps(REQUEST) + "\n", encoding="utf-8")
    (folder / "keys").write_text("a-key-of-a-test\n", encoding="utf-8")
    (folder / "plan.toml").write_text("[mlp]\nblock = 64\n", encoding="utf-8")


def documented_commands() -> list[DocumentedCommand]:
    return help_examples() + [command for page in pages() for command in commands_of(page)]
