"""The page at / of the server, in a real Chromium, against a server whose answers are a script."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.support.chromium import Browser, chromium, found
from tests.support.scripted_chat_server import Piece, ScriptedServer, answer

pytestmark = [pytest.mark.browser, pytest.mark.skipif(found() is None, reason="no chromium with its driver")]

ESCAPE, SHIFT_ENTER = "\ue00c", "\ue008\ue007\ue000"
CALL: list[Piece] = [
    {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"Ulm"}'}}]},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]

Open = Callable[[list[list[Piece]]], tuple[Browser, ScriptedServer]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens the page of a server with a script. At the end its console must be silent."""
    with ExitStack() as stack:

        def open_page(script: list[list[Piece]]) -> tuple[Browser, ScriptedServer]:
            server = ScriptedServer(script)
            browser.driver.get(stack.enter_context(server.running()))
            browser.shows("scripted", "#model")
            return browser, server

        yield open_page
        assert browser.errors() == []


def choose(browser: Browser, **values: str) -> None:
    """Set fields of the settings and save them."""
    browser.find("#open-settings").click()
    for name, value in values.items():
        browser.script("document.forms['settings-form'].elements[arguments[0]].value = arguments[1]", name, value)
    browser.find("#settings-form button[type=submit]").click()


def test_an_answer_streams_with_its_reasoning_folded(opened: Open) -> None:
    go_on = threading.Event()
    pieces: list[Piece] = [{"reasoning_content": "Because."}, {"content": "**Yes**, "}, {"wait": go_on}, {"content": "it is."}]
    browser, server = opened([answer(*pieces)])
    browser.ask("Is it?")
    browser.shows("Yes,", ".markdown")
    assert browser.find("#stop").is_displayed() and not browser.find("#send").is_displayed()
    assert browser.find("article.assistant").get_attribute("aria-busy") == "true"
    go_on.set()
    browser.shows("7 tokens", ".foot")
    assert browser.text(".markdown") == "Yes, it is." and browser.text(".markdown strong") == "Yes"
    assert browser.find("details").get_attribute("open") is None and browser.text(".reasoning-text") == "Because."
    assert browser.find("#send").is_displayed()
    browser.ask("And now?")
    browser.until(lambda: len(server.requests) == 2)
    sent = server.requests[1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    assert sent[1] == {"role": "assistant", "content": "**Yes**, it is.", "reasoning_content": "Because."}


def test_what_a_model_writes_is_never_markup(opened: Open) -> None:
    text = "<img src=x onerror=alert(1)><b>b</b>\n\n[link](javascript:alert(1)) ![i](https://example.org/i.png)\n\n```html\n<script>1</script>\n```"
    browser, server = opened([answer({"content": text})])
    browser.ask("x")
    browser.shows("7 tokens")
    assert browser.script("return document.querySelectorAll('.turn :is(img, b, script, iframe)').length") == 0
    assert "<b>b</b>" in browser.text(".markdown") and "<script>1</script>" in browser.text(".markdown pre")
    assert [link.get_attribute("href") for link in browser.all(".markdown a")] == ["https://example.org/i.png"]
    assert {path.split("?")[0] for path in server.fetched} <= {
        "/",
        "/v1/models",
        *(
            f"/{name}"
            for name in browser.script("return performance.getEntriesByType('resource').map(e => new URL(e.name).pathname.slice(1))")
        ),
    }
    assert browser.script("return performance.getEntriesByType('resource').every(e => e.name.startsWith(location.origin))")


@pytest.mark.parametrize("way", ["escape", "button"])
def test_stopping_leaves_what_there_is(opened: Open, way: str) -> None:
    browser, server = opened([answer({"content": "Some words"}, {"wait": threading.Event()})])
    browser.ask("Go")
    browser.shows("Some words", ".markdown")
    if way == "escape":
        browser.press(ESCAPE)
    else:
        browser.find("#stop").click()
    browser.shows("stopped", ".foot")
    assert server.left.wait(20)
    assert browser.text(".markdown") == "Some words" and browser.find("#send").is_displayed()


def test_enter_sends_and_shift_enter_does_not(opened: Open) -> None:
    browser, server = opened([answer({"content": "ok"})])
    browser.find("#question").send_keys("one", SHIFT_ENTER, "two")
    assert server.requests == []
    browser.ask("")
    browser.shows("ok", ".markdown")
    assert server.requests[0]["messages"][0]["content"] == "one\ntwo"
    assert browser.script("return document.activeElement.id") == "question"


def test_settings_are_sent_and_kept(opened: Open) -> None:
    browser, server = opened([answer({"content": "ok"})])
    choose(browser, system="Be brief.", thinking="off", temperature="0.3", max_tokens="9", key="secret", theme="dark")
    assert browser.script("return document.documentElement.dataset.theme") == "dark"
    browser.driver.refresh()
    browser.shows("scripted", "#model")
    browser.ask("Hi")
    browser.shows("ok", ".markdown")
    sent = server.requests[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["max_tokens"]) == (0.3, 9) and sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert sent["authorization"] == "Bearer secret" and sent["model"] == "scripted" and sent["stream_options"] == {"include_usage": True}
    assert "secret" not in browser.script("return JSON.stringify(localStorage)")


def test_settings_that_cannot_be_used_are_not_saved(opened: Open) -> None:
    browser, _ = opened([answer()])
    choose(browser, tools="{")
    browser.shows("not a JSON list", "#tools-problem")
    assert browser.find("#settings").get_attribute("open") is not None
    browser.find("#cancel-settings").click()


def test_calls_are_shown_and_their_results_sent(opened: Open) -> None:
    browser, server = opened([answer({"content": "I look."}, *CALL, finish="tool_calls"), answer({"content": "Rain."})])
    choose(browser, tools=json.dumps(TOOLS))
    browser.ask("Weather?")
    browser.shows('"city": "Ulm"', ".call")
    browser.find(".results textarea").send_keys("wet")
    browser.find(".results button").click()
    browser.shows("Rain.", ".markdown")
    assert server.requests[0]["tools"] == TOOLS
    assistant, result = server.requests[1]["messages"][1:]
    assert assistant["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    ]
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": "wet"}


def test_conversations_are_kept_and_deleted(opened: Open) -> None:
    browser, server = opened([answer({"content": "first answer"}), answer({"content": "second answer"})])
    browser.ask("A first question")
    browser.shows("first answer", ".markdown")
    browser.find("#new").click()
    browser.ask("Something else")
    browser.shows("second answer", ".markdown")
    assert len(server.requests[1]["messages"]) == 1
    browser.driver.refresh()
    browser.until(lambda: [e.text for e in browser.all("#conversations .title")] == ["Something else", "A first question"])
    browser.all("#conversations .title")[1].click()
    browser.shows("first answer", ".markdown")
    browser.script("window.confirm = () => true")
    browser.find("#conversations .remove").click()
    browser.until(lambda: [e.text for e in browser.all("#conversations .title")] == ["A first question"])


def test_broken_and_full_storage_end_nothing(opened: Open) -> None:
    browser, _ = opened([answer({"content": "ok"})])
    browser.script(
        "localStorage.setItem('qwen-export.settings', '{');"
        'localStorage.setItem(\'qwen-export.conversation.x\', \'{"id": "x", "messages": 3}\');'
    )
    browser.driver.refresh()
    browser.shows("scripted", "#model")
    browser.script("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }")
    browser.ask("Hi")
    browser.shows("ok", ".markdown")
    browser.shows("no room", "#problem")


def test_a_browser_that_keeps_nothing(opened: Open) -> None:
    browser, _ = opened([answer({"content": "ok"})])
    code = """for (const name of ["localStorage", "sessionStorage"])
      Object.defineProperty(window, name, { get() { throw new DOMException("no", "SecurityError"); } });"""
    made = browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": code})
    browser.driver.refresh()
    browser.shows("scripted", "#model")
    browser.ask("Hi")
    browser.shows("ok", ".markdown")
    browser.until(lambda: [e.text for e in browser.all("#conversations .title")] == ["Hi"])
    browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", made)


def test_a_stream_that_is_no_json_is_a_problem(opened: Open) -> None:
    browser, _ = opened([[{"content": "Half"}, {"raw": "{"}]])
    browser.ask("Hi")
    browser.shows("cannot be read", ".foot")


def test_an_answer_can_be_made_again(opened: Open) -> None:
    browser, server = opened([answer({"content": "bad"}), answer({"content": "good"})])
    browser.ask("Hi")
    browser.shows("Answer again", ".foot")
    browser.find(".foot button:last-of-type").click()
    browser.shows("good", ".markdown")
    assert "bad" not in browser.text("#log") and server.requests[1]["messages"] == [{"role": "user", "content": "Hi"}]


def test_an_error_in_a_stream_keeps_what_came(opened: Open) -> None:
    browser, _ = opened([[{"content": "Half"}, {"error": {"message": "the backend failed"}}, {}]])
    browser.ask("Hi")
    browser.shows("the backend failed", ".foot")
    assert browser.text(".markdown") == "Half"


def test_a_connection_that_ends_early_is_a_problem(opened: Open) -> None:
    browser, _ = opened([[{"content": "Half"}]])
    browser.ask("Hi")
    browser.shows("the connection ended", ".foot")


def test_images_are_offered_where_the_model_takes_them(opened: Open) -> None:
    browser, server = opened([answer({"content": "A dot."})])
    assert browser.find("#attach").get_property("hidden")
    server.vision = True
    browser.driver.refresh()
    browser.until(lambda: not browser.find("#attach").get_property("hidden"))
    browser.script(
        "const c = document.createElement('canvas'); c.width = c.height = 4; c.toBlob((b) => {"
        "  const t = new DataTransfer(); t.items.add(new File([b], 'a.png', {type: 'image/png'}));"
        "  const f = document.getElementById('files'); f.files = t.files; f.dispatchEvent(new Event('change')); })"
    )
    browser.find("#attachments img")
    browser.ask("What is it?")
    browser.shows("A dot.", ".markdown")
    image, text = server.requests[0]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,") and text == {"type": "text", "text": "What is it?"}


def test_a_screen_reader_hears_the_answer_once_and_finds_names(opened: Open) -> None:
    browser, _ = opened([answer({"content": "The end."})])
    browser.ask("Hi")
    browser.shows("Answer: The end.", "#status")
    unnamed = browser.script(
        "return [...document.querySelectorAll('button, input, textarea, select')].filter((e) => !e.textContent.trim() "
        "&& !e.getAttribute('aria-label') && !e.labels?.length && !e.getAttribute('aria-hidden')).map((e) => e.outerHTML)"
    )
    assert unnamed == [] and browser.find("#log").get_attribute("aria-live") == "off"


def test_the_refusal_of_a_server_is_shown(browser: Browser) -> None:
    """Its status is in the console, too: the browser writes it there."""
    server = ScriptedServer([answer()])
    with server.running() as address:
        browser.driver.get(address)
        browser.shows("scripted", "#model")
        server.status = 429
        browser.ask("Hi")
        browser.shows("refused with 429", "#problem")
        assert browser.find("#question").get_property("value") == "Hi"
        server.status = 401
        browser.driver.refresh()
        browser.shows("refused with 401", "#problem")
        assert browser.find("#settings").get_attribute("open") is not None
    browser.errors()


def test_a_server_that_still_loads_is_asked_again(browser: Browser) -> None:
    server = ScriptedServer([answer()])
    server.status = 503
    with server.running() as address:
        browser.driver.get(address)
        browser.shows("still loading", "#problem")
        server.status = 200
        browser.shows("scripted", "#model")
        browser.until(lambda: not browser.text("#problem"))
    browser.errors()


def test_a_narrow_screen_has_its_list_in_a_drawer() -> None:
    server = ScriptedServer([answer()])
    with chromium(width=520) as browser, server.running() as address:
        browser.driver.get(address)
        assert not browser.find("#new").is_displayed()
        browser.find("#menu").click()
        browser.until(lambda: browser.find("#new").is_displayed())
        browser.press(ESCAPE)
        browser.until(lambda: not browser.find("#new").is_displayed())
        assert browser.script("return document.documentElement.scrollWidth <= innerWidth")
