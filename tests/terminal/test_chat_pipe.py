"""`qwen-export chat` in a pipe: one question a line, answers on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_export.runtimes import SamplingParams, load

ROOT = Path(__file__).parents[2]
SHORT = ("--greedy", "--no-thinking", "--max-new-tokens", "12")


def chat(bundle: Path, lines: str | bytes, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "qwen_export", "chat", str(bundle), *arguments],
        input=lines.encode() if isinstance(lines, str) else lines,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_line_is_a_question_and_the_conversation_goes_on(demo_bundle: Path) -> None:
    done = chat(demo_bundle, "def add(a, b):\n\none\\\ntwo\n", *SHORT, "--quiet")
    with load(demo_bundle) as model:
        greedy = SamplingParams(greedy=True)
        messages = [{"role": "user", "content": "def add(a, b):"}]
        first = "".join(model.stream(messages, enable_thinking=False, sampling=greedy, max_new_tokens=12))
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "one\ntwo"}]
        second = "".join(model.stream(messages, enable_thinking=False, sampling=greedy, max_new_tokens=12))
    assert done.returncode == 0
    assert done.stdout == f"{first}\n{second}\n" and done.stderr == ""


def test_only_answers_reach_stdout(demo_bundle: Path) -> None:
    done = chat(demo_bundle, "Hello\n/stats\n", "--greedy", "--thinking", "--max-new-tokens", "12")
    assert done.stdout == "" and "The user asks" in done.stderr and "of 8192 tokens" in done.stderr


def test_a_failed_question_ends_nothing_and_is_in_the_exit_code(demo_bundle: Path) -> None:
    lines = "x " * 200 + "\n/load no-such-file\n//a\n"
    done = chat(demo_bundle, lines, *SHORT, "--max-context", "64")
    assert done.returncode == 1 and done.stdout.strip()
    assert done.stderr.count("error:") == 2 and "no-such-file" in done.stderr


def test_bytes_that_are_no_text_and_no_input_at_all(demo_bundle: Path) -> None:
    assert chat(demo_bundle, b"a \xff\xfe b\n", *SHORT).returncode == 0
    done = chat(demo_bundle, "", *SHORT)
    assert done.returncode == 0 and done.stdout == ""


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"messages": 3}', '{"messages": [{"role": 1}]}', '[{"role": "user"}]', "[" * 5000, b"\xff"],
)
def test_files_that_are_no_conversations_change_nothing(demo_bundle: Path, tmp_path: Path, content: str | bytes) -> None:
    from qwen_export.errors import QwenExportError
    from qwen_export.terminal.conversation import Conversation

    file = tmp_path / "c.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with load(demo_bundle) as model:
        conversation = Conversation(model, system="kept", messages=[{"role": "user", "content": "kept"}])
        with pytest.raises(QwenExportError, match="cannot be loaded"):
            conversation.load(file)
        assert conversation.system == "kept" and len(conversation.messages) == 1


def test_a_chat_request_of_another_program_can_be_loaded(demo_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    messages = [{"role": "system", "content": parts}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    file.write_text(json.dumps({"model": "x", "messages": messages, "enable_thinking": False}))
    done = chat(demo_bundle, f"/load {file}\n/system\nGo on\n/save {tmp_path / 'out.json'}\n", "--greedy", "--max-new-tokens", "4")
    assert done.returncode == 0 and "system message: Be brief." in done.stderr
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert saved["enable_thinking"] is False


def test_saving_replaces_conversations_only(demo_bundle: Path, tmp_path: Path) -> None:
    other, own = tmp_path / "notes.txt", tmp_path / "c.json"
    other.write_text("precious")
    lines = f"/save {own}\nHi\n/save {own}\n/save {other}\n/save {tmp_path / 'no' / 'such'}\n"
    done = chat(demo_bundle, lines, *SHORT)
    assert done.returncode == 1 and "is no conversation" in done.stderr and "cannot be saved" in done.stderr
    assert other.read_text() == "precious" and len(json.loads(own.read_text())["messages"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "notes.txt"]
