"""The first hour with a box, in a browser: the link on the terminal, a key, a request with the
OpenAI SDK, its receipt, and the end of the key and of the session."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import OpenWindow
from tests.support.browser import INSECURE_HOST, log_in, log_out, page_loaded
from tests.support.pages import PASSWORD, make_owner
from tests.support.process_box import MODEL
from tests.support.terminal import Terminal


class Started(NamedTuple):
    """A box that serves on a terminal, with the link and the key that it printed there."""

    url: str
    link: str
    key: str
    home: Path


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    home = tmp_path_factory.mktemp("terminal") / "home"
    with Terminal("serve", "--port", "0", home=home) as terminal:
        terminal.expect("[Y/n]")  # whether to pull a larger model
        terminal.enter("n")
        terminal.expect("Try it")
        terminal.expect("sk-pnv-")
        link = re.search(r"(http://[^/\s]+)/login/link/\S+", terminal.shown)
        key = re.search(r"sk-pnv-\w+", terminal.shown)
        assert link is not None and key is not None, terminal.shown
        reader = threading.Thread(target=terminal.end, daemon=True)  # or it would wait to print
        reader.start()
        yield Started(link[1], link[0], key[0], home)
        terminal.process.terminate()
        reader.join()


@pytest.fixture(scope="module")
def request_id(started: Started) -> str:
    with client_of(started.url, started.key) as client:
        return ask(client)


@pytest.fixture(scope="module")
def owner(started: Started) -> None:
    """The owner has a password."""
    with ThreadPoolExecutor(1) as other_thread:  # it runs a loop, and the browser's runs here
        other_thread.submit(make_owner, started.home).result()


def create_key(page: Page, name: str) -> str:
    """On the page of API keys; its secret."""
    page.goto("/keys")
    page.get_by_role("button", name="Create key").first.click()
    dialog = page.locator("#create")
    dialog.get_by_label("Name").fill(name)
    dialog.get_by_role("button", name="Create").click()
    secret = page.locator("#secret-text")
    expect(secret).to_contain_text("sk-pnv-")
    text = secret.inner_text()
    with page_loaded(page):
        page.get_by_role("button", name="I have copied it").click()
    expect(page.get_by_role("rowheader", name=name)).to_be_visible()
    assert text not in page.content()  # it is shown once
    return text


def client_of(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300)


def ask(client: openai.OpenAI) -> str:
    """One short answer of the real model; its request_id."""
    messages: Any = [{"role": "user", "content": "Say hello."}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8)
    assert answer.choices[0].message.content
    return str((answer.model_extra or {})["request_id"])


def test_from_the_link_to_the_first_verified_receipt(
    started: Started, open_window: OpenWindow
) -> None:
    window = open_window(started.url)
    page = window.page
    page.goto(started.link)
    page.get_by_label("New password").fill(PASSWORD)
    page.get_by_label("The same again").fill(PASSWORD)
    with page_loaded(page, "/dashboard"):
        page.get_by_role("button", name="Set the password").click()

    dashboard = window.context.new_page()
    dashboard.goto("/dashboard")
    expect(dashboard.locator("#live")).to_have_text("Live")
    secret = create_key(page, "the first program")
    with client_of(started.url, secret) as client:
        request_id = ask(client)

        row = dashboard.get_by_role("row", name=MODEL).filter(has_text="the first program")
        expect(row.first).to_be_visible()  # it came by itself
        with page_loaded(dashboard, f"/explorer/r/{request_id}"):
            row.first.get_by_role("link").click()
        expect(dashboard.locator("#result .verdict.ok")).to_contain_text("checks hold")
        assert dashboard.locator("#result li.bad").count() == 0

        page.goto("/explorer")  # by the search field, too
        page.get_by_label("request_id", exact=True).fill(request_id)
        page.keyboard.press("Enter")
        expect(page.locator("#result .verdict.ok")).to_be_visible()

        page.goto("/keys")
        mine = page.get_by_role("row").filter(has_text="the first program")
        mine.get_by_role("button", name="Revoke").click()
        with page_loaded(page):
            page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
        expect(page.get_by_text("1 revoked or expired")).to_be_visible()
        with pytest.raises(openai.AuthenticationError):
            ask(client)

    log_out(window)
    assert not window.context.cookies()
    page.goto("/dashboard")
    expect(page).to_have_url(re.compile("/login"))

    window.allow("status of 4")
    page.goto(started.link)  # it works once
    expect(page.get_by_role("heading", name="This link does not work")).to_be_visible()


def flipped(receipt: str | bytes, field: str) -> bytes:
    """The receipt with another letter in one of its texts."""
    document = json.loads(receipt)
    text: str = document[field]
    place = len(text) // 2
    document[field] = text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]
    return json.dumps(document).encode()


def answering(body: bytes) -> Callable[[Route], None]:
    return lambda route: route.fulfill(body=body)


@pytest.mark.parametrize("host", ["127.0.0.1", INSECURE_HOST])
def test_one_changed_byte_turns_a_receipt_red(
    started: Started, open_window: OpenWindow, owner: None, request_id: str, host: str
) -> None:
    """Also where the page comes over plain HTTP from another machine, so that the browser offers
    no cryptography."""
    url = started.url.replace("127.0.0.1", host)
    window = open_window(url)
    page = window.page
    log_in(window, "owner", to="/dashboard")
    page.goto(f"/explorer/r/{request_id}")
    assert page.evaluate("() => crypto.subtle === undefined") == (host == INSECURE_HOST)
    expect(page.locator("#result .verdict.ok")).to_be_visible()

    receipt = page.evaluate(
        "async (path) => (await fetch(path)).text()", f"{page.url}/receipt.json"
    )
    for field in ("signed_receipt", "coordinator_signature"):
        changed = flipped(receipt, field)
        page.route("**/receipt.json", answering(changed))
        page.get_by_role("button", name="Verify again").click()
        expect(page.locator("#result .verdict.bad")).to_contain_text("does not verify")
        expect(page.locator("#result li.bad").first).to_be_visible()
        page.unroute("**/receipt.json")
        page.get_by_role("button", name="Verify again").click()
        expect(page.locator("#result .verdict.ok")).to_be_visible()


def test_a_receipt_that_somebody_has_is_verified_from_its_file(
    started: Started, open_window: OpenWindow, owner: None, request_id: str
) -> None:
    window = open_window(started.url)
    page = window.page
    log_in(window, "owner", to="/dashboard")
    page.goto(f"/explorer/r/{request_id}")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the receipt").click()
    receipt = download.value.path().read_bytes()
    page.goto("/explorer")
    for data, verdict in ((receipt, "ok"), (flipped(receipt, "signed_receipt"), "bad")):
        file: Any = {"name": "r.json", "mimeType": "application/json", "buffer": data}
        page.get_by_label("The receipt, a JSON file").set_input_files(file)
        expect(page.locator(f"#file-result .verdict.{verdict}")).to_be_visible()
