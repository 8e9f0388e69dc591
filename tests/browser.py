"""A headless browser that tests open our pages in, and what must hold for each page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import psutil
import pytest
from playwright.sync_api import Browser, Page, Request, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), "")
needs_browser = pytest.mark.skipif(
    not CHROMIUM, reason="Chromium is not installed: apt-get install chromium-headless-shell"
)
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}
WAIT_MILLISECONDS = 60_000
"""For what a page shows in seconds where the machine has nothing else to do."""

_TOO_WIDE = """() => [...document.querySelectorAll("body *")].filter(element => {
  const box = element.getBoundingClientRect();
  return !element.closest(".table, .picture, svg") && box.width && box.right > innerWidth + 1;
}).map(element => `${element.tagName} ${element.className}`)"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Chromium, for which there is no other machine."""
    here = {address.address for found in psutil.net_if_addrs().values() for address in found if "." in address.address}
    rules = ", ".join(["MAP * ~NOTFOUND", *(f"EXCLUDE {address}" for address in sorted(here))])
    alone = ["--no-sandbox", "--disable-gpu", f"--host-resolver-rules={rules}"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=alone)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """A page, and all that it has asked for and complained of."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def waits_for(self, selector: str, text: str) -> None:
        """Until an element holds a text."""
        self.page.locator(selector, has_text=text).first.wait_for(timeout=WAIT_MILLISECONDS)

    def waits_for_fact(self, name: str, value: str) -> None:
        """Until a figure at the top has a value."""
        exact = f'.facts div:has(dt:text-is("{name}")) dd:text-is("{value}")'
        self.page.locator(exact).first.wait_for(timeout=WAIT_MILLISECONDS)

    def is_in_order(self) -> None:
        """Nothing is wider than the window, no script or policy complained, and no other host was asked."""
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert self.page.evaluate(_TOO_WIDE) == []
        assert self.complaints == []
        assert {urlsplit(url).hostname for url in self.requests} == {urlsplit(self.page.url).hostname}


@contextmanager
def watched(browser: Browser, url: str, viewport: dict[str, int] | None = None, **options: str) -> Iterator[Watched]:
    """Open a page in a profile of its own.

    Args:
        browser: Opens it.
        url: Its address.
        viewport: Width and height; default: a phone's.
        options: Of the profile, as Playwright calls them.
    """
    context = browser.new_context(viewport=viewport or PHONE, **options)  # type: ignore[arg-type]
    found = Watched(context.new_page())

    def requested(request: Request) -> None:
        if not request.url.startswith("data:"):
            found.requests.append(request.url)

    found.page.on("console", lambda message: found.complaints.append(message.text))
    found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.page.on("request", requested)
    try:
        found.page.goto(url)
        yield found
    finally:
        context.close()
