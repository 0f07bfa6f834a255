"""The explorer checks a transcript in the browser: one that the box keeps, a file, a text, a sealed
one; and nothing of it is sent."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Request, expect

from tests.browser.conftest import OpenWindow
from tests.support import transcript_vectors
from tests.support.axe import serious_violations
from tests.support.browser import INSECURE_HOST, Window, take_screenshot, what_is_too_wide
from tests.support.fake_model import FAKE
from tests.support.in_process_command import run_command_json
from tests.support.pages import PASSWORD, make_account, make_owner
from tests.support.process_box import Box, StartBox

WORD = "Wolpertinger"
RECEIPT, TRANSCRIPT = "The receipt, a JSON file", "The transcript, a JSON file"
VECTORS = """async (vectors) => {
  const { verifyReceipt } = await import("/static/verify.js");
  const failed = [];
  for (const { receipt, transcript, secret } of vectors) {
    const checks = await verifyReceipt(receipt, { transcript: { document: transcript, secret } });
    failed.push(checks.filter(({ ok }) => !ok).map(({ id }) => id));
  }
  return failed;
}"""


@dataclass
class Asked:
    """A request of the owner to a box: its receipt with the opening, and what is kept of it."""

    box: Box
    request_id: str
    key: str
    receipt: bytes
    transcript: bytes


def asked(start: StartBox, kept: str) -> Asked:
    box = start("--model", f"{FAKE}=fake:1", config=f'[receipts]\ntranscripts = "{kept}"\n')
    with ThreadPoolExecutor(1) as other_thread:  # they run a loop, and the browser's runs here
        other_thread.submit(make_owner, box.home).result()
        other_thread.submit(make_account, box.home, "bob", role="admin").result()
    key = str(run_command_json("keys", "create", "--account", "owner", home=box.home)["key"])
    body = {"model": FAKE, "messages": [{"role": "user", "content": WORD}], "max_tokens": 5}
    request_id = box.http("POST", "/v1/chat/completions", json=body, key=key).json()["request_id"]
    path = f"/v1/receipts/{request_id}"
    receipt, transcript = (
        box.http("GET", one, key=key).content for one in (path, f"{path}/transcript")
    )
    return Asked(box, request_id, key, receipt, transcript)


@pytest.fixture(scope="module")
def plain(module_box: StartBox) -> Asked:
    return asked(module_box, "plain")


@pytest.fixture(scope="module")
def sealed(module_box: StartBox) -> Asked:
    return asked(module_box, "sealed")


def open_as(open_window: OpenWindow, url: str, name: str = "owner") -> Window:
    window = open_window(url)
    page = window.page
    page.goto("/login")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    expect(page).to_have_url(re.compile("/dashboard"))
    return window


class Sent:
    """What a page has sent since, and that none of it has one of the words."""

    def __init__(self, page: Page) -> None:
        self.requests: list[Request] = []
        page.on("request", lambda request: self.requests.append(request))

    def assert_without(self, *words: str) -> None:
        for request in self.requests:
            text = f"{request.url} {request.post_data} {request.headers}"
            assert request.method == "GET" and request.post_data is None
            assert not [word for word in words if word in text]


def file(data: bytes) -> Any:
    return {"name": "a.json", "mimeType": "application/json", "buffer": data}


def changed(transcript: bytes) -> bytes:
    """With another token."""
    answer = json.loads(transcript)
    answer["transcript"]["legs"][0]["tokens"][0] += 1
    return json.dumps(answer).encode()


def expect_verdict(page: Page, verdict: str, *failed: str) -> None:
    expect(page.locator(f"#file-result .verdict.{verdict}")).to_be_visible()
    found = page.locator("#file-result li.bad").evaluate_all(
        "(all) => all.map((one) => one.dataset.check)"
    )
    assert found == [*failed]
    assert page.locator("#file-result li[data-check^=transcript]").count()


def look_at(page: Page, name: str) -> None:
    wrong = []
    for width in (1440, 360):
        page.set_viewport_size({"width": width, "height": 900})
        take_screenshot(page, f"{name}-{width}")
        wrong += what_is_too_wide(page) + serious_violations(page)
    assert not wrong, "\n".join(wrong)


def test_each_vector_is_judged_in_chromium(plain: Asked, open_window: OpenWindow) -> None:
    page = open_window(plain.box.url).page
    page.goto("/docs")
    expected: dict[str, list[str]] = json.loads(transcript_vectors.EXPECTED.read_text())
    files = [transcript_vectors.FOLDER / f"{name}.json" for name in expected]
    vectors = [json.loads(one.read_text()) for one in files]
    assert page.evaluate(VECTORS, vectors) == list(expected.values())


@pytest.mark.parametrize("host", ["127.0.0.1", INSECURE_HOST])
def test_the_owner_checks_what_the_box_keeps_and_what_it_has(
    plain: Asked, open_window: OpenWindow, host: str
) -> None:
    """Also where the browser offers no cryptography."""
    page = open_as(open_window, plain.box.url.replace("127.0.0.1", host)).page
    page.goto(f"/explorer/r/{plain.request_id}")
    assert page.evaluate("() => crypto.subtle === undefined") == (host == INSECURE_HOST)
    expect(page.locator("#result .verdict.ok")).to_be_visible()
    check = page.get_by_role("button", name="Check the transcript")
    check.click()
    expect_verdict(page, "ok")
    sent = Sent(page)
    page.get_by_label(TRANSCRIPT).set_input_files(file(changed(plain.transcript)))
    expect_verdict(page, "bad", "transcript 0")
    alone = json.dumps(json.loads(plain.transcript)["transcript"])
    page.get_by_label("The transcript's text").fill(alone)
    check.click()
    expect_verdict(page, "ok")
    sent.assert_without(WORD)
    assert {request.url.rpartition("/")[2] for request in sent.requests} == {plain.request_id}


def test_a_receipt_and_a_transcript_are_given_without_a_mouse(
    plain: Asked, open_window: OpenWindow
) -> None:
    page = open_as(open_window, plain.box.url).page
    page.goto("/explorer")
    sent = Sent(page)
    page.get_by_label("The receipt's text").focus()
    page.keyboard.insert_text(plain.receipt.decode())
    page.keyboard.press("Tab")
    expect(page.get_by_label(TRANSCRIPT)).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_label("The transcript's text")).to_be_focused()
    page.keyboard.insert_text(plain.transcript.decode())
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Verify")).to_be_focused()
    page.keyboard.press("Enter")
    expect_verdict(page, "ok")
    expect(page.locator("#file-result").get_by_role("status")).to_contain_text("checks hold")
    look_at(page, "explorer-transcript")
    page.get_by_label(TRANSCRIPT).set_input_files(file(changed(plain.transcript)))
    expect_verdict(page, "bad", "transcript 0")
    look_at(page, "explorer-transcript-wrong")
    page.get_by_label(TRANSCRIPT).set_input_files(file(b"words"))
    expect_verdict(page, "bad", "transcript")
    sent.assert_without(WORD)
    assert all("/static/" in request.url for request in sent.requests)  # pictures of marks


def test_a_sealed_one_asks_for_its_key(sealed: Asked, open_window: OpenWindow) -> None:
    page = open_as(open_window, sealed.box.url.replace("127.0.0.1", INSECURE_HOST)).page
    page.goto(f"/explorer/r/{sealed.request_id}")
    expect(page.locator("#result .verdict.ok")).to_be_visible()
    page.get_by_role("button", name="Check the transcript").click()
    key = page.get_by_label("API key that made the request")
    expect(key).to_be_focused()
    expect(page.get_by_role("alert").filter(has_text="The transcript is sealed")).to_be_visible()
    look_at(page, "explorer-transcript-sealed")
    sent = Sent(page)
    key.fill(sealed.key[:-1])
    key.press("Enter")
    expect_verdict(page, "bad", "transcript")
    expect(page.locator("#file-result li.bad")).to_contain_text("not sealed to this key's secret")
    key.fill(sealed.key)
    key.press("Enter")
    expect_verdict(page, "ok")
    sent.assert_without(WORD, sealed.key, sealed.key[:-1])


def test_another_account_is_told_what_is_missing(
    plain: Asked, open_window: OpenWindow, tmp_path: Path
) -> None:
    page = open_as(open_window, plain.box.url, "bob").page
    page.goto(f"/explorer/r/{plain.request_id}")
    expect(page.get_by_role("button", name="Check the transcript")).to_have_count(0)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the receipt").click()
    without = download.value.path().read_bytes()
    page.get_by_role("link", name="verify them here").click()
    expect(page.get_by_role("button", name="Verify")).to_be_visible()
    page.get_by_label(TRANSCRIPT).set_input_files(file(plain.transcript))
    expect(page.get_by_role("alert").filter(has_text="Give the receipt too")).to_be_visible()
    page.get_by_label(RECEIPT).set_input_files(file(without))
    expect_verdict(page, "bad", "transcript")
    expect(page.locator("#file-result li.bad")).to_contain_text("ask the key's owner")
    page.get_by_label(RECEIPT).set_input_files(file(plain.receipt))
    expect_verdict(page, "ok")
