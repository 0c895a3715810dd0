"""The page as `qwen-export serve` sends it: its headers, and a conversation with a real bundle in a real Chromium."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_export.runtimes.server.server_settings import ServerSettings
from tests.support.chromium import chromium, found
from tests.support.live_server import LiveServer, live_server

PAGE = Path(__file__).parents[2] / "runtimes" / "server" / "page"


@pytest.fixture(scope="module")
def live(demo_bundle: Path) -> Iterator[LiveServer]:
    with live_server(demo_bundle, ServerSettings(api_keys=("secret",))) as server:
        yield server


def test_every_file_has_its_type_and_a_strict_policy(live: LiveServer) -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for name, suffix in (("", ".html"), *((path.name, path.suffix) for path in PAGE.iterdir())):
        with urllib.request.urlopen(f"{live.url}/{name}") as answer:
            assert answer.headers["content-type"].startswith(types[suffix])
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'self'") and "unsafe" not in policy and "*" not in policy


def test_the_page_names_no_other_host() -> None:
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"(?:https?:)?//[\w-]+\.[\w.-]+", text.replace("http://www.w3.org/2000/svg", "")), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", text), path.name


@pytest.mark.browser
@pytest.mark.skipif(found() is None, reason="no chromium with its driver")
def test_a_conversation_with_a_key(live: LiveServer) -> None:
    with chromium() as browser:
        browser.driver.get(live.url)
        browser.shows("key", "#problem")
        field = browser.find("#settings-form [name=key]")
        field.send_keys("secret")
        browser.script(
            "const f = document.forms['settings-form'].elements; f.max_tokens.value = 12; f.temperature.value = 0; f.thinking.value = 'off'"
        )
        browser.find("#settings-form button[type=submit]").click()
        browser.shows(live.service.names[0], "#model")
        browser.ask("def add(a, b):")
        browser.shows("12 tokens", ".foot")
        browser.shows("cut off at the limit", ".foot")
        assert "is a function" in browser.text(".markdown")
        browser.ask("And now?")
        browser.until(lambda: len(browser.all("article.assistant")) == 2)
        browser.until(lambda: browser.text(".foot").count("12 tokens") == 2)
