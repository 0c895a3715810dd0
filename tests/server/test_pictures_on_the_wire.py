"""Pictures and videos over HTTP, with the official clients and a random checkpoint that sees: what counts, what is refused, and how."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from qwen_export.runtimes.server.server_settings import MEDIA, ServerSettings
from tests.support.live_server import LiveServer, live_server
from tests.support.pictures import encoded, photo
from tests.support.videos import video

SMALL = replace(MEDIA, min_pixels=32 * 32, max_pixels=128 * 128, max_frames=8, max_media_tokens=64)
PICTURE, OTHER = encoded(photo(64, 96)), encoded(photo(64, 96, seed=1))
TOKENS = 6
PLAIN = {"enable_thinking": False, "ignore_eos": True}
CALL = {"id": "call_1", "type": "function", "function": {"name": "see", "arguments": "{}"}}
TOOL = {"name": "see", "description": "", "parameters": {"type": "object", "properties": {}}}


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    (directory / "a.png").write_bytes(PICTURE)
    (directory.parent / "outside.png").write_bytes(PICTURE)
    (directory / "link.png").symlink_to(directory.parent / "outside.png")
    return directory


@pytest.fixture(scope="module")
def seeing(tiny_bundle: Path, root: Path) -> Iterator[LiveServer]:
    media = replace(SMALL, access=replace(MEDIA.access, files=True, root=root))
    with live_server(tiny_bundle, ServerSettings(names=("tiny",), media=media), max_context=512) as server:
        yield server


@pytest.fixture(scope="module")
def client(seeing: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def http(seeing: LiveServer) -> httpx.Client:
    return httpx.Client(base_url=seeing.url, timeout=60)


def chat(client: openai.OpenAI, *parts: dict[str, Any], **more: Any) -> Any:
    messages = [{"role": "user", "content": [{"type": "text", "text": "see:"}, *parts]}]
    return client.chat.completions.create(**{"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0, **more})  # type: ignore[call-overload]


def image(data: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(data), **more}}


def test_a_picture_counts_a_token_per_part_of_it(client: openai.OpenAI) -> None:
    none, one, two = (chat(client, *[image(PICTURE)] * count).usage.prompt_tokens for count in range(3))
    assert one - none == two - one == TOKENS + 2
    large = encoded(photo(256, 256))
    assert chat(client, image(large)).usage.prompt_tokens == none + 16 + 2


def test_answers_are_about_the_picture(client: openai.OpenAI) -> None:
    def said(data: bytes) -> str:
        return str(chat(client, image(data), max_tokens=24, extra_body=PLAIN).choices[0].message.content)

    first, other, again = said(PICTURE), said(OTHER), said(PICTURE)
    assert first == again != other
    streamed = chat(client, image(PICTURE), max_tokens=24, stream=True, extra_body=PLAIN)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == first


def test_a_video(client: openai.OpenAI) -> None:
    part = {"type": "video_url", "video_url": {"url": url(video(12), "video/mp4")}}
    text = chat(client).usage.prompt_tokens
    assert chat(client, part).usage.prompt_tokens > text + 2 * 2
    assert chat(client, part, image(PICTURE)).usage.prompt_tokens == chat(client, part).usage.prompt_tokens + TOKENS + 2


def test_results_of_tools_hold_pictures(client: openai.OpenAI) -> None:
    def tokens(result: Any) -> int:
        turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
        turns += [{"role": "tool", "tool_call_id": "call_1", "content": result}]
        return int(client.chat.completions.create(model="tiny", messages=turns, max_tokens=2).usage.prompt_tokens)  # type: ignore[arg-type,union-attr]

    assert tokens([{"type": "text", "text": "it"}, image(PICTURE)]) == tokens("it") + TOKENS + 2


def test_responses_with_pictures(client: openai.OpenAI) -> None:
    def tokens(*parts: Any, output: Any = None) -> int:
        items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "see:"}, *parts]}]
        if output is not None:
            items += [{"type": "function_call", "call_id": "c", "name": "see", "arguments": "{}"}]
            items += [{"type": "function_call_output", "call_id": "c", "output": output}]
        made = client.responses.create(model="tiny", input=items, max_output_tokens=2)
        assert made.usage is not None
        return made.usage.input_tokens

    part = {"type": "input_image", "image_url": url(PICTURE), "detail": "auto"}
    assert tokens(part) == tokens() + TOKENS + 2
    assert tokens(output=[{"type": "input_text", "text": "it"}, part]) == tokens(output="it") + TOKENS + 2


def test_messages_with_pictures(seeing: LiveServer) -> None:
    client = anthropic.Anthropic(base_url=seeing.url, api_key="none", max_retries=0, timeout=60)
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(PICTURE).decode()}
    block = {"type": "image", "source": source}

    def tokens(*blocks: Any, result: Any = None) -> int:
        turns: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "see:"}, *blocks]}]
        if result is not None:
            turns += [{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "see", "input": {}}]}]
            turns += [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": result}]}]
        made = client.messages.create(model="tiny", messages=turns, max_tokens=2)
        counted = client.messages.count_tokens(model="tiny", messages=turns).input_tokens
        assert counted == made.usage.input_tokens + (made.usage.cache_read_input_tokens or 0)
        return counted

    assert tokens(block) == tokens() + TOKENS + 2
    assert tokens(result=[{"type": "text", "text": "it"}, block]) == tokens(result="it") + TOKENS + 2
    with pytest.raises(anthropic.BadRequestError) as refused:
        tokens({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "////"}})
    assert refused.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    assert "messages[0].content[1]" in str(refused.value)


def test_tokens_of_a_prompt_with_pictures(client: openai.OpenAI, http: httpx.Client) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "see:"}, image(PICTURE)]}]
    assert http.post("/tokenize", json={"messages": turns}).json()["count"] == chat(client, image(PICTURE)).usage.prompt_tokens
    assert http.get("/v1/models/tiny").json()["capabilities"] == {"vision": True}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "damaged": (image(PICTURE[:500]), "damaged"),
    "no picture": (image(b"hello"), "a format that is not read"),
    "no base64": ({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}, "not valid base64"),
    "too narrow": (image(encoded(photo(1, 400))), "too narrow"),
    "too many tokens": (image(encoded(photo(128, 128))), "too many tokens"),
    "no video": ({"type": "video_url", "video_url": {"url": url(PICTURE, "video/mp4")}}, "too few frames|cannot be decoded"),
    "an address": ({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}, "not sent as data"),
    "outside of the directory": (image(b"") | {"image_url": {"url": "../outside.png"}}, "outside the directory"),
    "a link out of it": (image(b"") | {"image_url": {"url": "link.png"}}, "outside the directory"),
    "no file": (image(b"") | {"image_url": {"url": "file:///none.png"}}, "outside the directory|no such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_comes_before_the_first_byte(http: httpx.Client, name: str) -> None:
    part, message = REFUSED[name]
    parts = [part] * (5 if name == "too many tokens" else 1)
    body = {"messages": [{"role": "user", "content": parts}], "stream": True}
    answer = http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error" and error["code"] == "invalid_value"
    assert error["param"].startswith("messages")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error["message"])


def test_a_file_below_the_directory(client: openai.OpenAI, root: Path) -> None:
    sent = chat(client, image(PICTURE)).usage.prompt_tokens
    for name in ("a.png", str(root / "a.png"), (root / "a.png").as_uri()):
        assert chat(client, {"type": "image_url", "image_url": {"url": name}}).usage.prompt_tokens == sent


def test_low_detail_is_a_smaller_picture(seeing: LiveServer) -> None:
    turns: list[Any] = [{"role": "user", "content": [image(encoded(photo(640, 640)), detail=detail)]} for detail in ("low", "high")]
    counts = [len(seeing.model.prepare_chat([turn]).request.ids) for turn in turns]
    assert counts[1] - counts[0] == 400 - 256
