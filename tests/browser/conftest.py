"""Fixtures: one browser for the tests of a file, and windows in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pytest
from playwright.sync_api import Browser, expect

from tests.support import browser
from tests.support.browser import SECONDS, Window

expect.set_options(timeout=SECONDS * 1000)


class OpenWindow(Protocol):
    """Opens a window at a server, by its URL; options are those of Playwright's contexts."""

    def __call__(self, url: str, **options: Any) -> Window: ...


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.chromium() as started:
        yield started


@pytest.fixture
def open_window(chromium: Browser) -> Iterator[OpenWindow]:
    """`open_window(box.url)`; a test fails whose windows had faults."""
    opened: list[Window] = []

    def open_one(url: str, **options: Any) -> Window:
        opened.append(Window(chromium, url, **options))
        return opened[-1]

    yield open_one
    for window in opened:
        window.close()
