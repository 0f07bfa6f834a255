"""What pages of other sites, and people with somebody's cookie, cannot do with a session."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

from pinaivu_box.server.sessions import COOKIE
from tests.browser.conftest import OpenWindow
from tests.support.browser import INSECURE_HOST, Window, log_in, log_out, page_loaded
from tests.support.pages import PASSWORD, logged_in, make_account
from tests.support.process_box import Box


@contextmanager
def site(html: str) -> Iterator[int]:
    """Another server on this machine, whose every page is this; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            # Without an icon of its own the browser would ask for one, perhaps after the end.
            self.wfile.write(f'<link rel="icon" href="data:,">{html}'.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def account(box: Box, name: str) -> None:
    with ThreadPoolExecutor(1) as other_thread:  # it runs a loop, and the browser's runs here
        other_thread.submit(make_account, box.home, name).result()


def cookie_of(window: Window) -> str:
    """The session's."""
    return next(one["value"] for one in window.context.cookies() if one["name"] == COOKIE)


# The second is the same site to a browser, which sends it the cookie: only the port differs.
@pytest.mark.parametrize("host", [INSECURE_HOST, "127.0.0.1"])
def test_a_page_of_another_site_changes_nothing(
    fake_box: Box, open_window: OpenWindow, host: str
) -> None:
    account(fake_box, "visitor-of-sites")
    window = open_window(fake_box.url)
    log_in(window, "visitor-of-sites", to="/keys")
    window.allow("another host", "status of 4", "CORS", "ERR_FAILED")
    keys = f"{fake_box.url}/v1/account/keys"
    html = f"""<iframe name=there></iframe><form method=post action="{keys}" target=there
      enctype="text/plain"><input name='{{"name":"' value='stolen"}}'></form>"""
    page = window.page
    with site(html) as port:
        page.goto(f"http://{host}:{port}/")
        with page.expect_response(keys) as posted:
            page.evaluate("() => document.forms[0].submit()")
        assert posted.value.status in (401, 403)
        read = page.evaluate(
            """async (url) => {
              const options = { method: "POST", credentials: "include", body: '{"name": "x"}' };
              await fetch(url, { ...options, mode: "no-cors" });
              try { return await (await fetch(url, { credentials: "include" })).text(); }
              catch (error) { return error.name; }
            }""",
            keys,
        )
    assert read == "TypeError"  # it learns nothing either
    page.goto(f"{fake_box.url}/keys")
    expect(page.get_by_text("No API keys yet")).to_be_visible()


def test_no_page_is_shown_in_a_frame_of_another_site(
    fake_box: Box, open_window: OpenWindow
) -> None:
    window = open_window(fake_box.url)
    window.allow("another host", "frame-ancestors", "ERR_BLOCKED_BY_RESPONSE")
    with (
        site(f'<iframe src="{fake_box.url}/login"></iframe>') as port,
        window.page.expect_console_message(lambda message: "frame-ancestors" in message.text),
    ):
        window.page.goto(f"http://{INSECURE_HOST}:{port}/")


def test_a_change_without_the_csrf_token_is_refused(fake_box: Box, open_window: OpenWindow) -> None:
    account(fake_box, "without-token")
    window = open_window(fake_box.url)
    log_in(window, "without-token", to="/keys")
    window.allow("status of 403")
    page = window.page
    page.evaluate("() => { document.querySelector('meta[name=csrf-token]').content = 'wrong'; }")
    page.get_by_role("button", name="Create key").first.click()
    page.locator("#create").get_by_role("button", name="Create").click()
    expect(page.locator("#create [role=alert]").filter(has_text="reload the page")).to_be_visible()


def test_a_cookie_from_before_the_login_is_worth_nothing_after_it(
    fake_box: Box, open_window: OpenWindow
) -> None:
    account(fake_box, "mallory")
    account(fake_box, "alice")
    window = open_window(fake_box.url)
    with logged_in(fake_box.url, "mallory") as session:
        planted = session.cookies[COOKIE]
    window.use_cookies({COOKIE: planted})
    log_out(window)  # whoever finds herself in there
    log_in(window, "alice", to="/keys")
    assert cookie_of(window) != planted

    attacker = open_window(fake_box.url)
    attacker.use_cookies({COOKIE: planted})
    attacker.page.goto("/keys")
    expect(attacker.page).to_have_url(re.compile("/login"))


def test_a_stolen_session_ends_when_the_password_changes(
    fake_box: Box, open_window: OpenWindow
) -> None:
    account(fake_box, "bob")
    window, thief = open_window(fake_box.url), open_window(fake_box.url)
    log_in(window, "bob", to="/keys")
    thief.use_cookies({COOKIE: cookie_of(window)})
    thief.page.goto("/keys")
    expect(thief.page.get_by_role("heading", name="API Keys", exact=True)).to_be_visible()

    page = window.page
    page.goto("/account")
    page.get_by_label("Present password").fill(PASSWORD)
    page.get_by_label("New password").fill("another horse battery")
    page.get_by_label("The same again").fill("another horse battery")
    with page_loaded(page):
        page.get_by_role("button", name="Change the password").click()
    page.goto("/keys")
    expect(page.get_by_role("heading", name="API Keys", exact=True)).to_be_visible()
    thief.page.goto("/keys")
    expect(thief.page).to_have_url(re.compile("/login"))


def test_a_conversation_of_another_account_is_not_there(
    fake_box: Box, open_window: OpenWindow
) -> None:
    account(fake_box, "carol")
    account(fake_box, "dave")
    with logged_in(fake_box.url, "carol") as carol:
        made = carol.post("/v1/conversations", json={"title": "Carol's secret"})
    window = open_window(fake_box.url)
    log_in(window, "dave", to="/keys")
    window.allow("status of 404")
    window.page.goto(f"/chat/{made.json()['id']}")
    expect(window.page.get_by_test_id("notice")).to_be_visible()
    assert "Carol" not in window.page.content()


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server/app.py", "/static/..%2fapp.py", "/static/%2e%2e/app.py",
        "/static/..%5capp.py", "/static//etc/passwd", "/static/%2fetc/passwd",
        "/static/./style.css",
        "/static/style.css%00.js", "/static/style.css/", "/static/", "/static/templates/base.html",
    ],
)  # fmt: skip
def test_a_path_leads_to_no_other_file(fake_box: Box, path: str) -> None:
    """As written: browsers and clients would tidy it up."""
    parts = urlsplit(fake_box.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=180)
    connection.putrequest("GET", path, skip_host=False)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status == 404 or (path == "/static/style.css/" and answer.status == 200)
    assert b"import annotations" not in body and b"root:x:" not in body
