"""Logging in: sessions of browsers, and who must not get or keep one."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from nacl.exceptions import InvalidkeyError
from nacl.pwhash import argon2id

from pinaivu_box.login.session_keys import SessionKeys
from pinaivu_box.login.throttle import Throttle, network_of
from pinaivu_box.server.sessions import COOKIE, own_path
from pinaivu_box.store import accounts, sessions
from pinaivu_box.store.audit import BOX
from pinaivu_box.store.database import Database
from tests.support.fake_model import FAKE
from tests.support.pages import PASSWORD, log_in, logged_in, make_account, make_owner, visitor
from tests.support.process_box import Box, StartBox


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    config = '[server]\ntrusted_proxies = ["127.0.0.1"]\n'
    started = module_box("--model", f"{FAKE}=fake:1", config=config)
    make_account(started.home, "ada")
    make_owner(started.home)
    return started


@pytest.fixture
def ada(box: Box) -> Iterator[httpx.Client]:
    with logged_in(box.url) as client:
        yield client


def columns(box: Box, statement: str) -> list[tuple[object, ...]]:
    database = sqlite3.connect(box.home / "pinaivu.db")
    try:
        return database.execute(statement).fetchall()
    finally:
        database.close()


# -- a session -------------------------------------------------------------------------------------


def test_a_session_is_a_cookie_that_scripts_and_other_sites_do_not_get(box: Box) -> None:
    with visitor(box.url) as client:
        cookie = log_in(client).headers["set-cookie"]
    assert cookie.startswith(f"{COOKIE}=")
    parts = {part.strip().lower() for part in cookie.split(";")}
    assert {"httponly", "samesite=lax", "path=/"} <= parts
    assert "secure" not in parts  # over http


def test_a_session_may_do_what_its_pages_key_may(ada: httpx.Client) -> None:
    chat = {"model": FAKE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    answer = ada.post("/v1/chat/completions", json=chat)
    assert answer.status_code == 200
    request_id = answer.headers["x-request-id"]
    assert ada.get(f"/v1/receipts/{request_id}").json()["request_id"] == request_id
    assert ada.get("/v1/usage").status_code == 200
    assert ada.get("/v1/admin/keys").status_code == 403


def test_an_admin_s_session_has_the_admin_s_scope_while_the_account_is_an_admin_s(box: Box) -> None:
    make_account(box.home, "carol", role="admin")
    with logged_in(box.url, "carol") as carol, logged_in(box.url, "owner") as owner:
        assert carol.get("/v1/admin/keys").status_code == 200
        for role, status in (("member", 403), ("admin", 200)):
            changed = owner.patch("/v1/admin/accounts/carol", json={"role": role})
            assert changed.status_code == 200, changed.text
            assert carol.get("/v1/admin/keys").status_code == status


def test_the_pages_key_is_limited_and_blocked_as_any_key(box: Box) -> None:
    make_account(box.home, "dora")
    with logged_in(box.url, "dora") as dora:
        (key,) = box.http("GET", "/v1/admin/keys?account=dora").json()["data"]
        assert (key["name"], key["prefix"]) == ("pages", "")
        path = f"/v1/admin/keys/{key['id']}"
        assert box.http("POST", f"{path}/rotate").status_code == 409
        assert box.http("POST", f"{path}/revoke").status_code == 409
        policy = {"scopes": ["usage"]}
        assert box.http("PATCH", path, json={"policy": policy}).status_code == 200
        assert dora.get("/v1/usage").status_code == 200
        assert dora.get("/v1/receipts").status_code == 403
        assert box.http("PATCH", path, json={"blocked": "unpaid"}).status_code == 200
        refused = dora.get("/v1/usage")
        assert refused.status_code == 403 and "unpaid" in refused.text
        assert dora.get("/login").status_code == 200
        del dora.headers["x-csrf-token"]  # the page has none for a session that is good for nothing
        again = dora.post("/v1/session", json={"name": "dora", "password": PASSWORD})
        assert again.status_code == 403 and "unpaid" in again.text
        log_in(dora, "ada")


def test_a_browser_that_is_refused_gets_a_page(box: Box) -> None:
    """Also where no endpoint was asked yet, since the session or its key may not ask any."""
    make_account(box.home, "emil")
    path, html = "/chat/conv_none/messages", {"accept": "text/html"}
    with visitor(box.url) as nobody:
        assert nobody.get(path, headers=html).headers["content-type"].startswith("text/html")
        assert nobody.get(path).json()["error"]
    with logged_in(box.url, "emil") as emil:
        (key,) = box.http("GET", "/v1/admin/keys?account=emil").json()["data"]
        block = box.http("PATCH", f"/v1/admin/keys/{key['id']}", json={"blocked": "unpaid"})
        assert block.status_code == 200
        shown = emil.get(path, headers=html)
        assert shown.status_code == 403 and "unpaid" in shown.text and "<h1" in shown.text
        assert shown.headers["content-security-policy"]
        assert "unpaid" in emil.get(path).json()["error"]["message"]
        emil.cookies.delete(COOKIE)
        emil.cookies.set(COOKIE, "A" * 43)
        assert emil.get(path, headers=html).headers["location"].startswith("/login?next=")


def test_logging_out_ends_the_session(box: Box, ada: httpx.Client) -> None:
    cookie = dict(ada.cookies)
    assert ada.delete("/v1/session").json()["ended"]
    assert COOKIE not in ada.cookies
    with visitor(box.url) as thief:
        thief.cookies.update(cookie)
        stolen = thief.get("/v1/usage")
    assert stolen.status_code == 401 and stolen.json()["error"]["code"] == "session_ended"


def test_neither_cookies_nor_passwords_are_on_the_disk(box: Box, ada: httpx.Client) -> None:
    stored = b"".join(file.read_bytes() for file in box.home.glob("pinaivu.db*"))
    assert ada.cookies[COOKIE].encode() not in stored
    assert PASSWORD.encode() not in stored


def test_a_session_ends_after_days_without_a_request_and_after_a_month(box: Box) -> None:
    for column, days in (("last_seen", 15), ("created_at", 31)):
        with logged_in(box.url) as client:
            database = sqlite3.connect(box.home / "pinaivu.db")
            with database:
                database.execute(
                    f"UPDATE sessions SET {column} = {column} - ? WHERE rowid ="
                    " (SELECT max(rowid) FROM sessions)",
                    (days * 86_400_000,),
                )
            database.close()
            assert client.get("/v1/usage").status_code == 401


def test_the_keys_of_ended_sessions_are_dropped_and_no_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Database(tmp_path / "box.db") as database:
            begun = [
                await sessions.create(database, accounts.OWNER, address="127.0.0.1", user_agent="")
                for _ in range(3)
            ]
            kept, ended, _ = [session.id for session, _ in begun]
            unlocked = SessionKeys()
            unlocked.put(kept, b"k")
            unlocked.put(ended, b"e")
            await sessions.end(database, ended, accounts.OWNER, BOX)
            await unlocked.drop_ended(database)
            assert (unlocked.get(kept), unlocked.get(ended)) == (b"k", None)

    asyncio.run(scenario())


# -- other sites -----------------------------------------------------------------------------------


def test_a_change_without_the_csrf_token_is_refused(box: Box, ada: httpx.Client) -> None:
    with logged_in(box.url) as other:
        of_another_session = other.headers["x-csrf-token"]
    for token in (None, "", "x", of_another_session):
        del ada.headers["x-csrf-token"]
        if token is not None:
            ada.headers["x-csrf-token"] = token
        for method, path in (("POST", "/v1/chat/completions"), ("DELETE", "/v1/session")):
            refused = ada.request(method, path)
            assert refused.status_code == 403
            assert refused.json()["error"]["code"] == "cross_site_request"
        ada.headers["x-csrf-token"] = ""
    assert ada.get("/v1/usage").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://["},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_no_other_site_can_log_a_browser_in(box: Box, headers: dict[str, str]) -> None:
    body = {"name": "ada", "password": PASSWORD}
    with visitor(box.url) as client:
        refused = client.post("/v1/session", json=body, headers=headers)
        assert refused.status_code == 403 and "set-cookie" not in refused.headers


def test_the_own_page_can(box: Box) -> None:
    body = {"name": "ada", "password": PASSWORD}
    for headers in ({"origin": box.url}, {"sec-fetch-site": "same-origin", "origin": box.url}):
        with visitor(box.url) as client:
            assert client.post("/v1/session", json=body, headers=headers).status_code == 200


def test_a_cookie_from_before_the_login_is_not_taken_over(box: Box, ada: httpx.Client) -> None:
    planted, former = "A" * 43, ada.cookies[COOKIE]
    with visitor(box.url) as client:
        client.cookies.set(COOKIE, planted)
        log_in(client)
        assert planted not in [cookie.value for cookie in client.cookies.jar if cookie.domain]
    log_in(ada)
    assert ada.cookies[COOKIE] != former
    for old in (planted, former):
        answer = httpx.get(f"{box.url}/v1/usage", cookies={COOKIE: old}, timeout=60)
        assert answer.status_code == 401


@pytest.mark.parametrize(
    "path",
    ["//evil.example", "/\\evil.example", "https://evil.example", "/\t/evil", "evil", "", "/a\n"],
)
def test_the_login_leads_to_pages_of_this_box_only(box: Box, path: str) -> None:
    assert own_path(path) == ""
    with visitor(box.url) as client:
        body = {"name": "ada", "password": PASSWORD, "next": path}
        assert client.post("/v1/session", json=body).json()["next"] == "/chat"


def test_the_login_leads_back(box: Box) -> None:
    body = {"name": "ada", "password": PASSWORD, "next": "/usage?days=7"}
    with visitor(box.url) as client:
        assert client.post("/v1/session", json=body).json()["next"] == "/usage?days=7"
    with visitor(box.url) as client:
        answer = client.post("/v1/session", json=body, headers={"x-forwarded-prefix": "/box"})
    assert answer.json()["next"] == "/box/usage?days=7"
    assert "path=/box;" in answer.headers["set-cookie"].lower() + ";"


# -- plain HTTP ------------------------------------------------------------------------------------


def from_afar(scheme: str) -> dict[str, str]:
    """What a proxy on this machine says of a client elsewhere."""
    return {"x-forwarded-for": "192.0.2.7", "x-forwarded-proto": scheme}


def test_passwords_cross_no_network_that_others_can_read(box: Box) -> None:
    body = {"name": "ada", "password": PASSWORD}
    with visitor(box.url) as client:
        refused = client.post("/v1/session", json=body, headers=from_afar("http"))
        assert refused.status_code == 403 and "https://" in refused.text
        page = client.get("/login", headers=from_afar("http")).text
        assert "allow_plain_login" in page and "<form" not in page
        page = client.get("/login", headers=from_afar("https")).text
        assert "data-login" in page and "Not encrypted" not in page
        taken = client.post("/v1/session", json=body, headers=from_afar("https"))
        assert taken.status_code == 200
        assert "secure" in taken.headers["set-cookie"].lower()


def test_where_the_operator_allows_it_the_page_says_what_it_means(new_box: StartBox) -> None:
    config = '[server]\ntrusted_proxies = ["127.0.0.1"]\nallow_plain_login = true\n'
    started = new_box("--model", f"{FAKE}=fake:1", config=config)
    make_account(started.home, "ada")
    with visitor(started.url) as client:
        page = client.get("/login", headers=from_afar("http")).text
        assert "Not encrypted" in page and "data-login" in page
        body = {"name": "ada", "password": PASSWORD}
        assert client.post("/v1/session", json=body, headers=from_afar("http")).status_code == 200


# -- guessing --------------------------------------------------------------------------------------


def test_a_wrong_name_is_answered_as_a_wrong_password(box: Box) -> None:
    with visitor(box.url) as client:
        answers = [
            client.post("/v1/session", json={"name": name, "password": "wrong"})
            for name in ("ada", "nobody", "a\0b", "a" * 200)
        ]
    bodies = [{**answer.json(), "request_id": ""} for answer in answers]
    assert [answer.status_code for answer in answers] == [401] * 4
    assert all(body == bodies[0] for body in bodies)


def test_an_unknown_name_costs_what_a_wrong_password_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hash with the same parameters is checked in each case, also where there is no password."""
    checked: list[tuple[str, ...]] = []

    def verify(hashed: bytes, _: bytes) -> None:
        checked.append(tuple(hashed.decode().split("$")[1:4]))
        raise InvalidkeyError

    async def try_all() -> None:
        async with Database(tmp_path / "box.db") as database:
            await accounts.create(database, "ada", "member", PASSWORD, BOX)
            await accounts.create(database, "bob", "member", None, BOX)
            monkeypatch.setattr(argon2id, "verify", verify)
            for name in ("ada", "bob", "nobody", ""):
                assert await accounts.verify_password(database, name, "wrong") is None

    asyncio.run(try_all())
    assert len(checked) == 4 and len(set(checked)) == 1


def test_who_guesses_has_to_wait(box: Box) -> None:
    make_account(box.home, "eve")
    with visitor(box.url) as client:
        statuses = [
            client.post("/v1/session", json={"name": "eve", "password": f"guess {n}"})
            for n in range(9)
        ]
        assert [one.status_code for one in statuses[:5]] == [401] * 5
        refused = [one for one in statuses if one.status_code == 429]
        assert refused and int(refused[0].headers["retry-after"]) >= 1
    login = {"name": "ada", "password": PASSWORD}
    assert httpx.post(f"{box.url}/v1/session", json=login, timeout=60).status_code == 200


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def fail(throttle: Throttle, account: str, address: str, times: int) -> None:
    for _ in range(times):
        throttle.attempt(account, address)


def test_delays_double_up_to_a_quarter_of_an_hour() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    fail(throttle, "ada", "192.0.2.1", 4)
    waits = []
    for _ in range(14):
        waits.append(throttle.wait("ada", "192.0.2.1"))
        throttle.attempt("ada", "192.0.2.1")
    assert waits[:6] == [0, 1, 2, 4, 8, 16] and waits[-1] == 900
    clock.now += 899
    assert throttle.wait("ada", "192.0.2.1") == 1
    clock.now += 1
    assert throttle.wait("ada", "192.0.2.1") == 0
    throttle.succeeded("ada", "192.0.2.1")
    throttle.attempt("ada", "192.0.2.1")
    assert throttle.wait("ada", "192.0.2.1") == 0


def test_nobody_locks_a_person_out_from_another_address() -> None:
    throttle = Throttle(Clock())
    for n in range(200):
        fail(throttle, "ada", f"198.51.100.{n}", 4)
    assert throttle.wait("ada", "192.0.2.1", known=True) == 0
    assert 0 < throttle.wait("ada", "192.0.2.1") <= 10


def test_an_account_of_one_s_own_makes_no_guesses_free() -> None:
    throttle = Throttle(Clock())
    for n in range(30):
        fail(throttle, f"victim{n}", "192.0.2.1", 1)
        throttle.attempt("own", "192.0.2.1")
        throttle.succeeded("own", "192.0.2.1")
    assert throttle.wait("victim99", "192.0.2.1") > 60


def test_an_ipv6_network_counts_as_one_address() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2")
    assert network_of("::ffff:192.0.2.1") == "192.0.2.1"


# -- pages -----------------------------------------------------------------------------------------


def test_the_login_page_says_what_it_needs(box: Box) -> None:
    with visitor(box.url) as client:
        page = client.get("/login?next=/usage")
    assert page.status_code == 200 and 'data-next="/usage"' in page.text
    assert '<form class="fields" method="post"' in page.text
    assert "<noscript>" in page.text and page.text.count("<label") == 2


def test_who_has_logged_in_is_sent_on(ada: httpx.Client) -> None:
    for path, target in (("/login", "/chat"), ("/login?next=//evil.example", "/chat")):
        answer = ada.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, target)
    assert "ada" in ada.get("/logout").text
