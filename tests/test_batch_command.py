"""`qwen-export batch`: every line gets its answer, in order, whatever its neighbors are; a second run goes on where the first stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_export.commands.cli import main
from qwen_export.runtimes import SamplingParams, load


def chat(name: str, text: str, **body: Any) -> str:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 6, "temperature": 0, "enable_thinking": False, **body}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body})


def completion(name: str, text: str) -> str:
    body = {"prompt": text, "max_tokens": 6, "temperature": 0, "logprobs": None, "user": "someone"}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body})


LINES = [
    chat("first", "def add(a, b):"),
    "this is no JSON",
    completion("text", "def sub(a, b):"),
    chat("too hot", "hello", temperature=-1),
    chat("long", "word " * 3000),
    json.dumps({"custom_id": "elsewhere", "method": "POST", "url": "/v1/embeddings", "body": {}}),
    chat("odd", "hello", messages="not a list"),
    chat("last", "class Stack:"),
]


@pytest.fixture
def batch(demo_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text("\n".join(LINES) + "\n")

    def run() -> tuple[int, list[dict[str, Any]], str]:
        code = 0
        try:
            main(["batch", str(demo_bundle), str(requests), "-o", str(answers), "--max-context", "256", "--threads", "1", "--slots", "3"])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, [json.loads(line) for line in answers.read_text().splitlines()], capfd.readouterr().err

    run.answers = answers  # type: ignore[attr-defined]
    run.requests = requests  # type: ignore[attr-defined]
    return run


def test_every_line_in_order(batch: Any, demo_bundle: Path) -> None:
    code, answers, err = batch()
    assert code == 0
    assert [line["custom_id"] for line in answers] == ["first", None, "text", "too hot", "long", "elsewhere", "odd", "last"]
    assert [line["response"]["status_code"] for line in answers] == [200, 400, 200, 400, 400, 400, 400, 200]
    assert "8 requests, 5 without an answer" in err
    model = load(demo_bundle, max_context=256, threads=1)
    expected = "".join(
        model.stream(
            [{"role": "user", "content": "def add(a, b):"}], sampling=SamplingParams(greedy=True), max_new_tokens=6, enable_thinking=False
        )
    )
    first = answers[0]["response"]["body"]
    assert first["choices"][0]["message"] == {"role": "assistant", "content": expected}
    assert first["object"] == "chat.completion"
    assert first["usage"]["total_tokens"] == first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    assert answers[2]["response"]["body"]["choices"][0]["text"] == "".join(
        model.complete("def sub(a, b):", sampling=SamplingParams(greedy=True), max_new_tokens=6)
    )
    error = answers[3]["response"]["body"]["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "temperature")


def test_streams_beside_the_bare_loop(demo_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["bench", str(demo_bundle), "--streams", "1,3", "--prompt-tokens", "8", "--new-tokens", "4", "--threads", "1", "--json"])
    rows = json.loads(capfd.readouterr().out)
    assert [row["streams"] for row in rows] == [1, 3]
    assert all(row["engine_tok_per_s"] > 0 and row["bare_tok_per_s"] > 0 and row["first_token_s"] > 0 for row in rows)


def test_an_interrupted_run_goes_on(batch: Any) -> None:
    _, whole, _ = batch()
    lines = batch.answers.read_text().splitlines(keepends=True)
    batch.answers.write_text("".join(lines[:2]) + lines[2][:30])
    code, again, _ = batch()
    assert code == 0
    assert again[:2] == whole[:2]
    assert [line["custom_id"] for line in again] == [line["custom_id"] for line in whole]
    assert again[2]["response"]["body"]["choices"] == whole[2]["response"]["body"]["choices"]


def test_answers_of_other_requests_are_not_continued(batch: Any) -> None:
    batch()
    kept = batch.answers.read_text()
    batch.requests.write_text("\n".join(reversed(LINES)) + "\n")
    code, _, err = batch()
    assert code == 1
    assert "belong to other requests" in err
    assert batch.answers.read_text() == kept
