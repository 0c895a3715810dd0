"""`qwen-export chat` at a terminal: what a person types, and what the screen shows."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("needs a pseudo terminal", allow_module_level=True)

from tests.support.screen import ROOT, Terminal

SHORT = ("--greedy", "--no-thinking", "--max-new-tokens", "12")
PROMPT = "\n>"


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """Directories of a user."""
    return {f"XDG_{name}_HOME": str(tmp_path / name) for name in ("STATE", "CACHE", "DATA")}


def history(tmp_path: Path) -> Path:
    return tmp_path / "STATE" / "qwen-export" / "chat-history"


def test_a_conversation_with_several_lines_and_commands(demo_bundle: Path, tmp_path: Path, home: dict[str, str]) -> None:
    saved = tmp_path / "saved.json"
    with Terminal("chat", demo_bundle, *SHORT, **home) as terminal:
        assert "context 8192 tokens" in terminal.until(PROMPT)
        terminal.press("def add(a, b):\r")
        terminal.until("(length)", "> def add(a, b):")
        terminal.press("one\\\rtwo\x1b\rthree\x1b[200~\nfour\nfive\x1b[201~\r")
        terminal.until("(length)", count=2)
        terminal.press("/stats\r")
        terminal.until("12 new", "reused", "of 8192 tokens")
        terminal.press("/think on\r")
        terminal.until("thinking: on")
        terminal.press("/system Answer in French.\r")
        terminal.until("system message: Answer in French.")
        terminal.press(f"/save {saved}\r")
        terminal.until("saved 5 messages")
        terminal.press("/reset\r")
        terminal.until("a new conversation")
        terminal.press(f"/load {saved}\r")
        terminal.until("loaded 5 messages")
        terminal.press("/image cat.png\r")
        terminal.until("this bundle takes text only")
        terminal.press("/nonsense\r")
        terminal.until("there is no such command: got /nonsense")
        terminal.press("/quit\r")
        assert terminal.ends() == 0
    written = json.loads(saved.read_text())
    assert written["enable_thinking"] is True
    assert [m["content"] for m in written["messages"] if m["role"] != "assistant"] == [
        "Answer in French.",
        "def add(a, b):",
        "one\ntwo\nthree\nfour\nfive",
    ]


def test_an_interrupt_ends_the_answer_and_not_the_program(demo_bundle: Path, home: dict[str, str]) -> None:
    with Terminal("chat", demo_bundle, "--greedy", "--no-thinking", **home) as terminal:
        terminal.until(PROMPT)
        terminal.press("def add(a, b):\r")
        terminal.until("is a function")
        terminal.press("\x03")
        terminal.until("(interrupted)")
        terminal.press("half a question\x03")
        terminal.until("Ctrl-D or /quit", count=2)  # the first is the greeting
        terminal.press("/stats\r")
        terminal.until("interrupted", "context:")
        assert terminal.leaves() == 0


def test_questions_are_remembered_by_their_owner(demo_bundle: Path, tmp_path: Path, home: dict[str, str]) -> None:
    for keys in ("a question to remember", "\x1b[A"):  # the second time, the key for the last one
        with Terminal("chat", demo_bundle, *SHORT, **home) as terminal:
            terminal.until(PROMPT)
            terminal.press(keys)
            terminal.until("a question to remember")
            terminal.press("\r")
            terminal.until("(length)")
            assert terminal.leaves() == 0
    assert history(tmp_path).read_text().count("a question to remember") == 1
    assert stat.S_IMODE(history(tmp_path).stat().st_mode) == 0o600


def test_no_history_leaves_no_file(demo_bundle: Path, tmp_path: Path, home: dict[str, str]) -> None:
    with Terminal("chat", demo_bundle, *SHORT, "--no-history", **home) as terminal:
        terminal.until(PROMPT)
        terminal.press("a secret\r")
        terminal.until("(length)")
        assert terminal.leaves() == 0
    assert not history(tmp_path).exists()


def test_a_state_directory_that_cannot_be_written(demo_bundle: Path, tmp_path: Path, home: dict[str, str]) -> None:
    (tmp_path / "STATE").write_text("a file")
    with Terminal("chat", demo_bundle, *SHORT, **home) as terminal:
        terminal.until(PROMPT)
        terminal.press("hello\r")
        terminal.until("(length)")
        assert terminal.leaves() == 0


def test_sigterm_ends_the_program(demo_bundle: Path, home: dict[str, str]) -> None:
    with Terminal("chat", demo_bundle, "--greedy", **home) as terminal:
        terminal.until(PROMPT)
        terminal.process.kill(signal.SIGTERM)
        assert terminal.ends() == 143


def test_reasoning_is_dim_and_an_error_ends_nothing(demo_bundle: Path, home: dict[str, str]) -> None:
    with Terminal("chat", demo_bundle, "--greedy", "--thinking", "--max-context", "64", **home) as terminal:
        terminal.until(PROMPT)
        terminal.press("x " * 100 + "\r")
        terminal.until("error:", "context")
        terminal.press("Hello\r")
        terminal.until("The user asks", "(context full)", "/reset")
        assert terminal.leaves() == 0


def test_a_terminal_needs_the_extra_and_says_so(demo_bundle: Path, tmp_path: Path, home: dict[str, str]) -> None:
    (tmp_path / "prompt_toolkit.py").write_text("raise ModuleNotFoundError(name='prompt_toolkit')")
    with Terminal("chat", demo_bundle, **home, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)])) as terminal:
        terminal.until("needs the extra `chat`", "pip install '.[chat]'")
        assert terminal.ends() == 1
