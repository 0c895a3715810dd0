"""A real browser, for the tests of the page: Chromium without a window, driven by selenium."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE_S = 20
BROWSERS, DRIVERS = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)


def found() -> tuple[str, str] | None:
    """Paths of the browser and of its driver."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = next(filter(None, map(shutil.which, DRIVERS)), None)
    return (browser, driver) if browser and driver else None


class Browser:
    """One tab at one address."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def find(self, selector: str) -> Any:
        """The first element, as soon as it is there."""
        from selenium.webdriver.common.by import By

        return self.until(lambda: next(iter(self.driver.find_elements(By.CSS_SELECTOR, selector)), None), selector)

    def all(self, selector: str) -> list[Any]:
        from selenium.webdriver.common.by import By

        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def text(self, selector: str) -> str:
        """Of all elements, shown or not."""
        return "\n".join(element.get_property("textContent") for element in self.all(selector))

    def until(self, condition: Callable[[], Any], what: str = "") -> Any:
        """What a condition gives, as soon as it is true."""
        from selenium.common.exceptions import StaleElementReferenceException

        for _ in range(PATIENCE_S * 20):
            try:
                if value := condition():
                    return value
            except StaleElementReferenceException:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not on the page: {what}\n{self.text('body')}")

    def shows(self, text: str, selector: str = "body") -> None:
        """Wait until an element has the text."""
        self.until(lambda: text in self.text(selector), f"{text!r} in {selector}")

    def ask(self, text: str) -> None:
        self.find("#question").send_keys(text + "\n")

    def press(self, key: str) -> None:
        """A key, wherever the focus is."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(key).perform()

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def errors(self) -> list[str]:
        """What the console has, of errors and broken policies."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@contextmanager
def chromium(width: int = 1100, height: int = 800, *flags: str) -> Iterator[Browser]:
    """A browser with a window of this size, in pixels; `flags` are further ones of its command line."""
    from selenium import webdriver

    paths = found()
    assert paths is not None
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}", *flags):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
