"""examples/browser in a real Chromium: a bundle runs in the page on ONNX Runtime for the web, and writes what the Python runtime writes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from qwen_export import build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.runtimes import SamplingParams, load
from tests.support.chromium import Browser, chromium, found
from tests.support.source_tree import ROOT

PAGE = ROOT / "examples" / "browser"
WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-unsafe-swiftshader")
"""A GPU made of the CPU: slow, and right."""
LONG = "# Adds two numbers.\ndef add(a, b):\n    return a + b\n\n" * 6 + "def sub(a, b):\n"
"""Three calls of the prompt graph."""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(found() is None, reason="no chromium with its driver"),
    pytest.mark.skipif(not (PAGE / "node_modules").is_dir(), reason="npm install --ignore-scripts in examples/browser"),
]

Open = Callable[..., Browser]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By precision. That in fp32 has graphs for drafts, too, which the page leaves alone."""
    folder, options = tmp_path_factory.mktemp("bundles"), {"fp32": StaticOptions(64), "int8": StaticOptions(64, step_tokens=1)}
    return {
        name: build(
            ROOT / "examples" / "demo-dense", folder / name, target="onnx", precision=name, max_context=256, options=one, mtp=name == "fp32"
        )
        for name, one in options.items()
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium(390, 800, *WEBGPU) as made:
        yield made


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens the page of a bundle, and waits until it is ready. At the end its console must be silent."""
    spec = importlib.util.spec_from_file_location("browser_example_server", PAGE / "serve.py")
    assert spec is not None and spec.loader is not None
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    with ExitStack() as stack:

        def open_page(bundle: Path, provider: str = "wasm", expected: str = "tokens of context") -> Browser:
            server = stack.enter_context(serve.server(bundle, quiet=True))
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            browser.driver.get(f"http://127.0.0.1:{server.server_port}/?provider={provider}")
            browser.shows(expected)
            return browser

        yield open_page
        assert browser.errors() == []


def choose(browser: Browser, chat: bool = False, **values: Any) -> None:
    browser.script("document.querySelector('[name=chat]').checked = arguments[0]", chat)
    for name, value in {"temperature": 0, **values}.items():
        browser.script("document.querySelector(`[name=${arguments[0]}]`).value = arguments[1]", name, value)


def ask(browser: Browser, text: str) -> None:
    browser.script("document.querySelector('#question').value = arguments[0]", text)
    browser.find("#send").click()


def written(bundle: Path, prompt: str | list[dict[str, str]], count: int) -> str:
    """The greedy text of the Python runtime."""
    model, greedy = load(bundle, threads=1, speculate="off"), SamplingParams(greedy=True)
    if isinstance(prompt, str):
        return "".join(model.complete(prompt, sampling=greedy, max_new_tokens=count))
    template = model.text_files.text("chat_template.jinja")
    assert template
    made = model.stream(prompt, sampling=greedy, max_new_tokens=count, enable_thinking=False)
    return "".join(made)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_page_writes_what_the_python_runtime_writes(opened: Open, bundles: dict[str, Path], precision: str) -> None:
    browser = opened(bundles[precision])
    choose(browser, most=40)
    ask(browser, LONG)
    browser.shows("length", "#status")
    assert "40 tokens" in browser.text("#status") and "prompt of 1" in browser.text("#status")
    assert browser.text(".answer") == LONG + written(bundles[precision], LONG, 40)


def test_a_conversation_goes_through_the_template(opened: Open, bundles: dict[str, Path]) -> None:
    browser, messages = opened(bundles["fp32"]), []
    choose(browser, chat=True, most=24)
    for question in ("What is a list?", "And a dict?"):
        messages.append({"role": "user", "content": question})
        ask(browser, question)
        browser.shows("prompt of", "#status")
        browser.until(lambda: browser.find("#send").is_displayed())
        answer = browser.all(".answer")[-1].get_property("textContent")
        assert answer == written(bundles["fp32"], messages, 24)
        messages.append({"role": "assistant", "content": answer})


def test_the_graphs_run_on_webgpu(opened: Open, bundles: dict[str, Path]) -> None:
    browser = opened(bundles["fp32"], "webgpu")
    choose(browser, most=3)
    ask(browser, "def add(a, b):")
    browser.shows("3 tokens", "#status")
    assert browser.text(".answer") == "def add(a, b):" + written(bundles["fp32"], "def add(a, b):", 3)


def test_text_streams_and_stops(opened: Open, bundles: dict[str, Path]) -> None:
    browser = opened(bundles["fp32"])
    assert "wasm, 1 thread," not in browser.text("#status") + ",", "the headers give it threads"
    choose(browser, most=200, temperature=1.5)
    ask(browser, "import os\n")
    browser.until(lambda: len(browser.text(".answer")) > len("import os\n") + 10)
    assert browser.find("#stop").is_displayed() and browser.find("#log").get_attribute("aria-busy") == "true"
    browser.find("#stop").click()
    browser.shows("stopped", "#status")
    assert browser.find("#send").is_displayed()


def test_the_page_is_readable_on_a_phone_and_in_the_dark(opened: Open, bundles: dict[str, Path]) -> None:
    browser = opened(bundles["fp32"])
    assert browser.script("return document.documentElement.scrollWidth <= innerWidth")
    colors = set()
    for scheme in ("light", "dark"):
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        colors.add(browser.script("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor].join()"))
    assert colors == {"rgb(29, 32, 38),rgb(255, 255, 255)", "rgb(230, 232, 236),rgb(22, 24, 29)"}
    assert min(browser.script("return [...document.querySelectorAll('button')].map((b) => b.offsetHeight || 44)")) >= 44


def test_a_bundle_that_is_damaged_or_of_another_target_is_a_message(opened: Open, bundles: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundles["int8"], tmp_path / "copy"))
    weights = bytearray((copy / "model.weights").read_bytes())
    weights[5000] ^= 1
    (copy / "model.weights").write_bytes(weights)
    opened(copy, expected="model.weights is not what the manifest describes")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["target"]["name"] = "directml"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    browser = opened(copy, expected="Build one with --target onnx")
    assert not browser.find("#send").is_enabled()
