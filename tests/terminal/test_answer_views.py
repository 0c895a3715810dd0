"""How answers look: Markdown in blocks, reasoning, and text that would take over a terminal."""

from __future__ import annotations

import io
import random

import pytest
from rich.console import Console
from rich.markdown import Markdown

from qwen_export.terminal.answer_views import MarkdownView, PlainView, finished_blocks
from qwen_export.terminal.printable import printable

DOCUMENT = """\
# Title

First paragraph, *with* `code` and **more**.

1. one
2. two

   inside two

```python
def f(x):

    return "# no title"
```

| a | b |
|---|---|
| 1 | 2 |

Last words: #hashtag
and an end
"""


def shown(pieces: list[str], *, reasoning: str = "") -> str:
    out = io.StringIO()
    view = MarkdownView(Console(file=out, width=60, force_terminal=False, color_system=None))
    if reasoning:
        view.reasoning(reasoning)
    for piece in pieces:
        view.content(piece)
    view.end()
    return out.getvalue()


def whole(text: str) -> str:
    out = io.StringIO()
    Console(file=out, width=60, force_terminal=False, color_system=None).print(Markdown(text, code_theme="ansi_dark"))
    return out.getvalue()


@pytest.mark.parametrize("seed", range(8))
def test_a_streamed_answer_looks_like_the_whole_one(seed: int) -> None:
    """Wherever the text is cut."""
    choose, pieces, rest = random.Random(seed), [], DOCUMENT
    while rest:
        size = choose.randint(1, 9)
        pieces.append(rest[:size])
        rest = rest[size:]
    assert words(shown(pieces)) == words(whole(DOCUMENT))


def words(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines() if line.strip()]


def test_blocks_are_finished_when_no_text_can_change_them() -> None:
    assert finished_blocks("A paragraph\n") == 0
    assert finished_blocks("A paragraph\n#") == 0  # may become a hashtag of the paragraph
    assert finished_blocks("A paragraph\n\n# Title\n") == len("A paragraph\n\n")
    assert finished_blocks("```\na\n\nb\n\n") == 0
    assert finished_blocks("- a\n\n- b\n") == 0


def test_reasoning_comes_before_the_answer() -> None:
    text = shown(["The answer."], reasoning="first\n\nsecond")
    assert [line.rstrip() for line in text.splitlines()] == ["first", "", "second", "", "The answer.", ""]


def test_a_view_without_an_answer_prints_nothing() -> None:
    assert shown([]) == ""


def test_plain_text_keeps_reasoning_aside() -> None:
    answers: list[str] = []
    aside: list[str] = []
    view = PlainView(answers.append, aside.append)
    view.reasoning("because")
    view.content("so ")
    view.content("it is")
    view.end()
    view.end()
    assert "".join(answers) == "so it is\n" and "".join(aside) == "because\n\n"


def test_a_model_cannot_control_the_terminal() -> None:
    attack = "a\x1b]0;title\x07b\x1b[2Jc\x9b31md\re\x08f\u202eg\tok\n"
    assert printable(attack) == "a]0;titleb[2Jc31mdefg\tok\n"
    assert "\x1b" not in shown([attack]) and "\x07" not in shown([attack])
