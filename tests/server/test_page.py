"""The chat page in a real browser, on a phone's screen."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.server import wait_for

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.real_model,  # its tokenizer
    pytest.mark.skipif(BROWSER is None, reason="no chromium here"),
]


@pytest.fixture
def page(server: Any) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        options = {"executable_path": BROWSER, "args": ["--no-sandbox"]}
        browser = playwright.chromium.launch(**options)
        page = browser.new_page(viewport={"width": 360, "height": 640})
        page.asked = []
        page.problems = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda line: line.type == "error" and page.problems.append(line.text))
        page.goto(server.url)
        yield page
        assert page.problems == []
        assert all(url.startswith((server.url, "data:")) for url in page.asked)
        browser.close()


def ask(page: Any, text: str, max_tokens: int) -> None:
    page.locator("summary").click()
    page.fill("#max_tokens", str(max_tokens))
    page.fill("#seed", "1")
    page.locator("summary").click()
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def test_an_answer_streams_with_its_speed(page: Any) -> None:
    expect(page.locator("#model")).to_have_text("tiny")
    ask(page, "Hello there", 12)
    page.wait_for_selector("#send:visible")
    assert page.locator(".user").inner_text() == "Hello there"
    assert page.locator(".assistant").inner_text()
    facts = page.locator(".facts").inner_text()
    assert re.fullmatch(r"first token \d+ ms · 12 tokens · [\d.]+ tokens/s( · cut off)?", facts)
    page.fill("#prompt", "And again")
    page.click("#send")
    expect(page.locator(".facts")).to_have_count(2)
    page.wait_for_selector("#send:visible")
    page.click("#clear")
    assert page.locator(".message").count() == 0


def test_an_answer_can_be_stopped(page: Any, server: Any) -> None:
    ask(page, "Tell me everything", 1500)
    expect(page.locator(".assistant")).to_have_text(re.compile(".{20}", re.DOTALL))
    page.click("#stop")
    page.wait_for_selector("#send:visible")
    idle = 'num_requests_running{model_name="tiny"} 0'
    wait_for(lambda: idle in server.get("/metrics")[1])


def test_nothing_is_wider_than_a_phone(page: Any) -> None:
    ask(page, "a" * 300, 5)
    page.wait_for_selector("#send:visible")
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
