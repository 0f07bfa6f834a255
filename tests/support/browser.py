"""Chromium, driven by Playwright, and windows in it that note every fault of a page."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Dialog,
    Page,
    Request,
    WebError,
    sync_playwright,
)

from tests.support.pages import PASSWORD

SECONDS = 180.0  # against hanging; never a claim about speed
# Hosts of tests, where the browser would otherwise ask a name server.  An origin by such a name and
# without TLS is not secure, so WebCrypto is missing there.
INSECURE_HOST = "lan.example"
# Of a stream that a page ends, or whose page is left, Chromium says that it was aborted.
_ABORTED = "net::ERR_ABORTED"
_TELL_VIOLATIONS = """document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`CSP: ${event.violatedDirective} forbids ${event.blockedURI} ${event.sample}`));"""


def path_of_chromium() -> str:
    """Skips the test where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (found := shutil.which(name)) is not None:
            return found
    pytest.skip("there is no Chromium here: install it (apt install chromium)")


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path_of_chromium(),
            timeout=SECONDS * 1000,
            args=[f"--host-resolver-rules=MAP {INSECURE_HOST} 127.0.0.1"],
        )
        yield browser
        browser.close()


class Window:
    """A browser context of its own at one server; `page` is its first page.

    `faults` are errors on the console, exceptions, native dialogs, violations of the CSP, requests
    that failed and those to other hosts, without those that match a pattern of `allow`.
    """

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.url = url
        self.context: BrowserContext = browser.new_context(
            base_url=url, viewport={"width": 1280, "height": 800}, **options
        )
        self.context.set_default_timeout(SECONDS * 1000)
        self._noted: list[str] = []
        self._allowed: list[str] = []
        self.context.add_init_script(_TELL_VIOLATIONS)
        self.context.on("console", self._note_message)
        self.context.on("weberror", self._note_exception)
        self.context.on("dialog", self._note_dialog)
        self.context.on("request", self._note_foreign)
        self.context.on("requestfailed", self._note_failure)
        self.page: Page = self.context.new_page()

    def allow(self, *patterns: str) -> None:
        """What a test provokes, as regular expressions."""
        self._allowed += patterns

    def use_cookies(self, cookies: Mapping[str, str]) -> None:
        self.context.add_cookies(
            [{"name": name, "value": value, "url": self.url} for name, value in cookies.items()]
        )

    @property
    def faults(self) -> list[str]:
        return [
            noted
            for noted in self._noted
            if not any(re.search(pattern, noted) for pattern in self._allowed)
        ]

    def close(self) -> None:
        """Raises AssertionError if there were faults."""
        self.context.close()
        assert not self.faults, "\n".join(self.faults)

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self._noted.append(f"console: {message.text} ({message.location.get('url', '')})")

    def _note_exception(self, error: WebError) -> None:
        self._noted.append(f"exception: {error.error}")

    def _note_dialog(self, dialog: Dialog) -> None:
        self._noted.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _note_foreign(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != urlsplit(self.url).netloc:
            self._noted.append(f"request to another host: {request.url}")

    def _note_failure(self, request: Request) -> None:
        if request.failure != _ABORTED:
            self._noted.append(f"request failed: {request.url} {request.failure}")


@contextmanager
def page_loaded(page: Page, url: str | None = None) -> Iterator[None]:
    """For an action that leads to another page, or loads this one again: waits until that page is
    loaded, when its scripts listen to its buttons.  (`expect(page).to_have_url` holds before that.)
    `url` is its address or path."""
    with page.expect_navigation(url=url, wait_until="load"):
        yield


def log_in(window: Window, name: str, password: str = PASSWORD, *, to: str) -> None:
    """Fill in the form of /login, and come to this path."""
    page = window.page
    page.goto(f"/login?next={to}")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(password)
    with page_loaded(page, to):
        page.get_by_role("button", name="Log in").click()


def log_out(window: Window) -> None:
    window.page.goto("/logout")
    with page_loaded(window.page, "/login"):
        window.page.get_by_role("button", name="Log out").click()


def take_screenshot(page: Page, name: str) -> None:
    """Into the folder PINAIVU_SCREENSHOTS; without one not at all, as they take long."""
    if folder := os.environ.get("PINAIVU_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


# Elements that reach out of the window to the right, unless something around them scrolls or clips.
_TOO_WIDE = """() => {
  const clipped = (element) => {
    for (let at = element.parentElement; at && at !== document.body; at = at.parentElement) {
      if (getComputedStyle(at).overflowX !== "visible") return true;
    }
    return false;
  };
  return [...document.body.querySelectorAll("*")]
    .filter((one) => one.getBoundingClientRect().right > innerWidth + 1 && !clipped(one))
    .map((one) => `${one.tagName.toLowerCase()}.${one.className} ${one.textContent.slice(0, 40)}`);
}"""


def what_is_too_wide(page: Page) -> list[str]:
    """Of a page that scrolls sideways, the elements that make it do so; empty if it does not."""
    if not page.evaluate("() => document.scrollingElement.scrollWidth > innerWidth"):
        return []
    found: list[str] = page.evaluate(_TOO_WIDE)
    return found or ["something"]
