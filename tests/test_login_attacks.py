"""What a page of another site, a forged header or a guesser tries against a browser's session."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from pinaivu_box import config
from pinaivu_box.box import Box
from pinaivu_box.box_services import open_box
from pinaivu_box.login.throttle import Throttle
from pinaivu_box.server.app import create_app
from pinaivu_box.server.endpoint import Endpoint
from pinaivu_box.server.endpoints import ENDPOINTS
from pinaivu_box.server.sessions import COOKIE
from pinaivu_box.server.sse import EventStream
from pinaivu_box.store import accounts
from pinaivu_box.store.audit import Actor
from tests.support.pages import PASSWORD

pytestmark = pytest.mark.anyio

EVIL = "evil.example"
HTML = {"accept": "text/html"}
# What pages of other sites can have a browser send without asking this box first.
FORMS: tuple[dict[str, Any], ...] = (
    {"files": {"content": ("a.json", b"{}", "application/json")}},
    {"data": {"name": "x"}},
    {"content": b'{"name": "x"}', "headers": {"content-type": "text/plain"}},
    {"content": b""},
)
# Rows that say that somebody was here.
_NOTED = (
    "refusals", "sessions", "runs", "clock", "probe", "sqlite_stat1",
    "log_checkpoints",  # what the log had anyway, signed for who asks
)  # fmt: skip


class Site:
    """A box, and browsers that reach it over HTTPS from this machine."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self._transport = httpx.ASGITransport(create_app(box), client=("127.0.0.1", 9))

    def browser(self, **more: Any) -> httpx.AsyncClient:
        base = "https://box.example"
        return httpx.AsyncClient(transport=self._transport, base_url=base, timeout=180, **more)

    @asynccontextmanager
    async def logged_in(self) -> AsyncIterator[httpx.AsyncClient]:
        """With the cookie, and without the token."""
        async with self.browser() as browser:
            done = await browser.post("/v1/session", json={"name": "ada", "password": PASSWORD})
            assert done.status_code == 200, done.text
            yield browser


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def opened(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    overrides: dict[tuple[str, ...], Any] = {("server", "cors_origins"): ("*",)}
    load = partial(config.load, None, environ={}, overrides=overrides)
    async with open_box(load, tmp_path_factory.mktemp("box") / "home") as box:
        await accounts.create(box.database, "ada", "admin", PASSWORD, Actor("test", "local"))
        yield Site(box)


@pytest.fixture
def site(opened: Site) -> Site:
    """Without a memory of what was guessed before; delays do not pass, however slow this is."""
    opened.box.login_throttle = Throttle(clock=lambda: 0.0)
    return opened


def address(endpoint: Endpoint) -> str:
    path: str = endpoint.path_format
    for name in endpoint.path_parameters:
        path = path.replace(f"{{{name}}}", "none")
    return path


async def test_no_form_of_another_site_changes_anything_in_a_session(site: Site) -> None:
    # Witnesses are asked by anybody, and believe signatures: a session makes no difference.
    changing = [one for one in ENDPOINTS if one.method != "GET" and "/witness/" not in one.path]
    assert {one.access for one in changing}.isdisjoint({"public"}) and len(changing) > 40

    async with site.logged_in() as browser:
        for endpoint in changing:
            for form in FORMS:
                refused = await browser.request(endpoint.method, address(endpoint), **form)
                assert refused.status_code == 403, (endpoint.path, refused.text)
                assert "cross_site_request" in refused.text, endpoint.path
        assert (await browser.get("/v1/account")).status_code == 200


def dump(home: Path) -> list[str]:
    database = sqlite3.connect(home / "pinaivu.db")
    lines = list(database.iterdump())
    database.close()
    return [line for line in lines if not line.startswith(tuple(map(_inserting, _NOTED)))]


def _inserting(table: str) -> str:
    return f'INSERT INTO "{table}"'


async def test_opening_an_address_changes_nothing(site: Site) -> None:
    """Links of other sites open addresses with the cookie (SameSite=Lax), and need no token."""
    opened = [
        one
        for one in ENDPOINTS
        if one.method == "GET" and one.media_types != [EventStream.media_type]
    ]

    async with site.logged_in() as browser:
        before = dump(site.box.home)
        for endpoint in opened:
            if "answers" in endpoint.path or endpoint.path.endswith("/events"):
                continue  # it has no end
            answer = await browser.get(address(endpoint), headers=HTML)
            assert answer.status_code < 500, (endpoint.path, answer.text)
        assert dump(site.box.home) == before
        assert (await browser.get("/v1/account")).status_code == 200


async def test_no_other_origin_may_read_with_the_cookie(site: Site) -> None:
    async with site.logged_in() as browser:
        for path in ("/v1/account", "/v1/admin/keys", "/v1/conversations", "/dashboard"):
            answer = await browser.get(path, headers={"origin": f"https://{EVIL}"})
            assert "access-control-allow-credentials" not in answer.headers
        asked = await browser.options(
            "/v1/admin/keys",
            headers={
                "origin": f"https://{EVIL}",
                "access-control-request-method": "POST",
                "access-control-request-headers": "x-csrf-token",
            },
        )
        assert "access-control-allow-credentials" not in asked.headers


HOSTS = (EVIL, "[", "[::1", f"{EVIL}/x?y", f"x@{EVIL}", f"{EVIL}#", "a b", "", "box.example:x")


async def test_a_forged_host_leads_nowhere(site: Site) -> None:
    for host in HOSTS:
        async with site.browser(headers={**HTML, "host": host}) as browser:
            for path in ("/", "/login", "/chat", "/explorer", "/nothing", "/login/link/x"):
                answer = await browser.get(path)
                assert answer.status_code < 500, (host, path, answer.text)
                # It may call itself so, as the browser does.
                assert f"//{EVIL}" not in answer.text, (host, path)
                location = answer.headers.get("location", "/")
                assert location.startswith("/") and not location.startswith("//"), location
                assert EVIL not in location


PREFIXES = ("", "/box", "//evil.example", "/\\evil.example")
PLACES = (
    "/..//evil.example", "/%2f%2fevil.example", "/%5cevil.example", "/;@evil.example", "/@evil",
    "//evil.example", "https://evil.example", "/\\evil", "/.//evil.example", "/box//evil.example",
)  # fmt: skip


async def test_whatever_is_asked_for_after_the_login_is_on_this_box(site: Site) -> None:
    for prefix in PREFIXES:
        headers = {**HTML, **({"x-forwarded-prefix": prefix} if prefix else {})}
        found: list[str | None] = []
        async with site.browser(headers=headers) as browser:
            for wanted in PLACES:
                led = await browser.get(f"/account?{wanted}")
                found.append(led.headers["location"])
            body = {"name": "ada", "password": PASSWORD, "next": PLACES[0]}
            found.append((await browser.post("/v1/session", json=body)).json()["next"])
            if prefix == "/box":
                browser.cookies.set(COOKIE, browser.cookies[COOKIE], path="/")
            for wanted in PLACES:
                found.append(
                    (await browser.get("/login", params={"next": wanted})).headers["location"]
                )
        for place in found:
            led_to = httpx.URL("https://box.example/login").join(str(place))
            assert led_to.host == "box.example" and "\\" not in str(place), (prefix, place)


async def test_a_forged_address_buys_no_guesses(site: Site) -> None:
    async with site.browser() as browser:
        for number in range(6):
            forged = {
                "x-forwarded-for": f"198.51.100.{number}, 192.0.2.{number}",
                "x-real-ip": f"198.51.100.{number}",
                "forwarded": f"for=198.51.100.{number}",
            }
            wrong = {"name": "ada", "password": f"wrong {number}"}
            answer = await browser.post("/v1/session", json=wrong, headers=forged)
            assert answer.status_code == (401 if number < 5 else 429), answer.text
        right = {"name": "ada", "password": PASSWORD}
        waiting = await browser.post("/v1/session", json=right)
        assert waiting.status_code == 429 and "set-cookie" not in waiting.headers


async def test_another_spelling_of_a_name_is_another_name(site: Site) -> None:
    """Or it would have a throttle of its own."""

    for name in ("ADA", "ada ", "ada\x00", "\uff41da"):
        async with site.browser() as browser:
            body = {"name": name, "password": PASSWORD}
            answer = await browser.post("/v1/session", json=body)
            assert answer.status_code in (400, 401, 422, 429), name


async def test_a_stolen_session_guesses_no_password(site: Site) -> None:
    """What asks for the password again is slowed as the login is."""

    async with site.browser() as browser:
        body = {"name": "ada", "password": PASSWORD}
        csrf = (await browser.post("/v1/session", json=body)).json()["csrf"]
        browser.headers["x-csrf-token"] = csrf
        asked: list[tuple[str, dict[str, Any]]] = [
            ("/v1/account/password", {"current": "wrong", "new": "another password"}),
            ("/v1/account/unlock", {"secret": "wrong"}),
            ("/v1/account/erase", {"name": "ada", "password": "wrong"}),
        ]
        for number in range(5):
            path, wrong = asked[number % 3]
            refused = await browser.post(path, json=wrong)
            assert refused.status_code == 403, (path, refused.text)
        for path, wrong in asked:
            refused = await browser.post(path, json=wrong)
            assert refused.status_code == 429, (path, refused.text)
