"""Whose a request is that a proxy forwards, and where pages are that it shows elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from pinaivu_box import config
from pinaivu_box.box_services import open_box
from pinaivu_box.policy import SCOPES, Policy
from pinaivu_box.server.app import create_app
from pinaivu_box.server.pages.routes import PAGES
from pinaivu_box.server.proxies import forwarded_by
from pinaivu_box.store import accounts
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.new_keys import Draft, create

PASSWORD = "correct horse battery"
TRUSTED = ("127.0.0.1", "10.0.0.0/8", "fd00::/8")


def seen(client: str, *headers: tuple[str, str], scheme: str = "http") -> dict[str, Any]:
    """The scope that the application gets."""
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": "http", "client": (client, 5), "scheme": scheme, "headers": raw}
    return dict(forwarded_by(scope, tuple(map(ip_network, TRUSTED))))


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("127.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        ("::ffff:127.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        # What the client wrote itself stands to the left.
        ("127.0.0.1", ["1.2.3.4, 198.51.100.7"], "198.51.100.7"),
        ("127.0.0.1", ["1.2.3.4", "198.51.100.7"], "198.51.100.7"),
        ("127.0.0.1", ["198.51.100.7, 10.0.0.2 ,10.9.9.9"], "198.51.100.7"),
        ("127.0.0.1", ["10.1.1.1, 198.51.100.7, 10.0.0.2"], "198.51.100.7"),
        # All are trusted: the first of them asks.
        ("127.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        # Ports, brackets, IPv6, and IPv4 in it.
        ("10.0.0.1", ["198.51.100.7:4711"], "198.51.100.7"),
        ("10.0.0.1", ["[2001:db8::7]:4711"], "2001:db8::7"),
        ("10.0.0.1", ["[2001:db8::7]"], "2001:db8::7"),
        ("10.0.0.1", ['"[2001:db8::7]:1"'], "2001:db8::7"),
        ("fd00::1", ["2001:db8::7, fd00::2"], "2001:db8::7"),
        ("10.0.0.1", ["::ffff:198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["fe80::1%eth0"], "fe80::1"),
        # What cannot be read is nobody, not the proxy.
        ("127.0.0.1", ["unknown"], ""),
        ("127.0.0.1", ["198.51.100.7, _hidden"], ""),
        ("127.0.0.1", ["999.1.1.1"], ""),
        ("127.0.0.1", ["é"], ""),
        ("127.0.0.1", ["10.0.0.1, " * 5000 + "10.0.0.2"], "10.0.0.1"),
        # Nothing is said, or nobody may say it.
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", [" , "], "127.0.0.1"),
        ("192.0.2.1", ["198.51.100.7"], "192.0.2.1"),
        ("11.0.0.1", ["198.51.100.7, 127.0.0.1"], "11.0.0.1"),
    ],
)
def test_the_client_is_the_last_address_that_is_no_trusted_proxys(
    peer: str, forwarded: list[str], client: str
) -> None:
    scope = seen(peer, *[("X-Forwarded-For", value) for value in forwarded])
    assert scope["client"][0] == client


def test_a_trusted_proxy_says_scheme_and_host() -> None:
    scope = seen(
        "127.0.0.1",
        ("Host", "127.0.0.1:4001"),
        ("X-Forwarded-For", "198.51.100.7"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "box.example:8443"),
    )
    assert scope["scheme"] == "https"
    assert [value for name, value in scope["headers"] if name == b"host"] == [b"box.example:8443"]


@pytest.mark.parametrize("proto", ["gopher", "", "https://evil.example", "HTTPSX"])
def test_nonsense_from_a_trusted_proxy_changes_nothing(proto: str) -> None:
    scope = seen(
        "127.0.0.1",
        ("Host", "box"),
        ("X-Forwarded-Proto", proto),
        ("X-Forwarded-Host", 'evil.example/"><script>'),
    )
    assert scope["scheme"] == "http" and (b"host", b"box") in scope["headers"]


def test_in_a_chain_the_outermost_trusted_proxy_says_the_scheme() -> None:
    chain = ("X-Forwarded-For", "198.51.100.7, 10.0.0.2")
    # The client's own word, then those of two proxies that each add theirs.
    said = ("X-Forwarded-Proto", "http, https, http")
    assert seen("127.0.0.1", chain, said)["scheme"] == "https"
    assert seen("127.0.0.1", chain, ("X-Forwarded-Proto", "https"))["scheme"] == "https"


def test_others_say_nothing() -> None:
    scope = seen(
        "192.0.2.1",
        ("Host", "box"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "evil.example"),
        ("X-Forwarded-Prefix", "/evil"),
    )
    assert scope["scheme"] == "http" and (b"host", b"box") in scope["headers"]
    assert not [name for name, _ in scope["headers"] if name == b"x-forwarded-prefix"]


def test_no_header_is_left_of_a_trusted_proxy_and_each_of_those_before_it() -> None:
    headers = (
        ("X-Forwarded-For", "1.2.3.4, 198.51.100.7"),
        ("X-Forwarded-Port", "443"),
        ("X-Forwarded-Prefix", "/box"),
        ("X-Real-IP", "198.51.100.7"),
        ("Via", "1.1 squid, 2.0 caddy"),
        ("Forwarded", "for=1.2.3.4"),
    )
    left = dict(seen("127.0.0.1", *headers)["headers"])
    assert left == {
        b"x-forwarded-for": b"1.2.3.4",
        b"via": b"1.1 squid",
        b"forwarded": b"for=1.2.3.4",
        b"x-forwarded-prefix": b"/box",
    }


@pytest.mark.parametrize("header", ["X-Forwarded-Proto", "X-Real-IP", "Via", "Forwarded"])
def test_a_trusted_proxy_that_names_no_client_is_still_seen(header: str) -> None:
    scope = seen("127.0.0.1", (header, "http"))
    assert [name for name, _ in scope["headers"]] == [header.lower().encode()]


# -- a box behind one ----------------------------------------------------------------------------


@asynccontextmanager
async def box_behind(folder: Path, *trusted: str) -> AsyncIterator[tuple[Starlette, str, Any]]:
    """The application of a box, an admin's key, and the box."""
    anonymous = config.load(None, environ={}).server.anonymous_key.__class__(
        "everyone", ("198.51.100.0/24", "127.0.0.0/8"), ("box.example",)
    )
    overrides: dict[tuple[str, ...], Any] = {
        ("server", "trusted_proxies"): trusted,
        ("server", "contact"): "https://help.example/",
        ("server", "anonymous_key", "key"): anonymous.key,
        ("server", "anonymous_key", "networks"): anonymous.networks,
        ("server", "anonymous_key", "hosts"): anonymous.hosts,
    }
    load = partial(config.load, None, environ={}, overrides=overrides)
    async with open_box(load, folder / "home") as box:
        by = Actor("test", "local")
        _, secret = await create(
            box.database, Draft("one", accounts.OWNER, Policy(scopes=SCOPES)), by
        )
        await create(box.database, Draft("everyone", accounts.OWNER, Policy()), by)
        yield create_app(box), secret, box


async def ask(app: Starlette, peer: str, method: str, path: str, **more: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app, client=(peer, 9))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1:4001", timeout=180
    ) as client:
        return await client.request(method, path, **more)


FORWARDED = {"X-Forwarded-For": "198.51.100.7", "X-Forwarded-Host": "box.example"}


def test_the_boxs_rules_apply_to_the_client_and_not_to_the_proxy(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with box_behind(tmp_path, "127.0.0.1") as (app, secret, box):
            admin = {"Authorization": f"Bearer {secret}"}
            # The audit trail has the client.
            policy = {"networks": ["203.0.113.0/24"]}
            body = {"account": "owner", "name": "far", "policy": policy}
            made = await ask(
                app, "127.0.0.1", "POST", "/v1/admin/keys", json=body, headers=admin | FORWARDED
            )
            assert made.status_code == 200, made.text
            audit = (await ask(app, "127.0.0.1", "GET", "/v1/admin/audit", headers=admin)).json()
            assert "198.51.100.7" in [entry["source"] for entry in audit["data"]]
            # Networks of keys mean the client too.
            far = {"Authorization": f"Bearer {made.json()['key']}"}
            for client, status in (("203.0.113.5", 200), ("198.51.100.7", 403)):
                got = await ask(
                    app, "127.0.0.1", "GET", "/v1/models",
                    headers=far | {"X-Forwarded-For": client},
                )  # fmt: skip
                assert got.status_code == status
            # And so do those of the anonymous key.
            for peer, headers, status in (
                ("127.0.0.1", FORWARDED, 200),
                ("127.0.0.1", {**FORWARDED, "X-Forwarded-For": "192.0.2.1"}, 401),
                ("127.0.0.1", {**FORWARDED, "X-Forwarded-For": "192.0.2.1, 198.51.100.7"}, 401),
                ("127.0.0.1", {**FORWARDED, "X-Forwarded-For": "unknown"}, 401),
                ("127.0.0.1", {**FORWARDED, "Forwarded": "for=192.0.2.1"}, 401),
                ("127.0.0.1", {"X-Forwarded-For": "198.51.100.7", "Host": "evil.example"}, 401),
                ("127.0.0.2", {"X-Forwarded-For": "127.0.0.1"}, 401),
                ("127.0.0.2", {}, 200),
                ("127.0.0.1", {"Via": "1.1 caddy"}, 401),
                ("127.0.0.1", {"X-Forwarded-Proto": "http"}, 401),
            ):
                got = await ask(app, peer, "GET", "/v1/models", headers=headers)
                assert got.status_code == status, (peer, headers, got.text)
            # A command on this machine says nothing of others, and is itself.
            token = {"Authorization": f"Bearer {box.control_token}"}
            got = await ask(app, "127.0.0.1", "GET", "/v1/admin/keys", headers=token)
            assert got.status_code == 200

    asyncio.run(scenario())


def test_pages_work_below_a_prefix_that_a_proxy_strips(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with box_behind(tmp_path, "127.0.0.1") as (app, _, box):
            proxy = StrippingProxy(app, "/box")
            await accounts.create(box.database, "ada", "admin", PASSWORD, Actor("test", "local"))
            transport = httpx.ASGITransport(proxy)
            async with httpx.AsyncClient(
                transport=transport, base_url="https://host.example", timeout=180
            ) as browser:
                html = {"Accept": "text/html"}
                shown = await browser.get("/box/no-such-page", headers=html)
                assert shown.status_code == 404
                links = linked(shown.text)
                assert links and all(link.startswith("/box/") for link in links), links
                for link in links:
                    if "/static/" in link:
                        assert (await browser.get(link)).status_code == 200, link
                assert "https://help.example/" in shown.text  # whom users can ask
                told = (await browser.get("/box/", headers={"Accept": "application/json"})).json()
                assert told["api"] == "/box/v1"
                assert (await browser.get("/box/docs")).status_code == 200
                document = (await browser.get("/box/openapi.json")).json()
                assert document["servers"] == [{"url": "/box"}]
                # A visitor is led to the login; who logs in has a cookie for the prefix only.
                led = await browser.get("/box/account", headers=html)
                assert led.is_redirect and led.headers["location"].startswith("/box/login")
                body = {"name": "ada", "password": PASSWORD, "next": "/account"}
                done = await browser.post("/box/v1/session", json=body)
                assert done.status_code == 200 and done.json()["next"] == "/box/account"
                cookie = done.headers["set-cookie"].lower()
                assert "path=/box;" in cookie and "secure" in cookie
                pages = [each.path for each in PAGES if not {"{", "."} & set(each.path)]
                for path in pages:
                    shown = await browser.get(f"/box{path}", headers=html)
                    location = shown.headers.get("location", "/box/")
                    assert location.startswith(("/box/", "http")), (path, location)
                    beside = [link for link in linked(shown.text) if not link.startswith("/box/")]
                    assert not beside, (path, beside)
                assert len(pages) > 10

    asyncio.run(scenario())


class StrippingProxy:
    """What nginx does with `location /box/ { proxy_pass http://127.0.0.1:4001/; }` and the headers
    of docs/pages.md."""

    def __init__(self, app: Any, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        assert path.startswith(f"{self._prefix}/"), f"{path} is not below {self._prefix}"
        host = dict(scope["headers"])[b"host"]
        kept = [one for one in scope["headers"] if one[0] != b"host"]
        added = {
            b"host": b"127.0.0.1:4001",
            b"x-forwarded-for": b"198.51.100.7",
            b"x-forwarded-proto": scope["scheme"].encode(),
            b"x-forwarded-host": host,
            b"x-forwarded-prefix": self._prefix.encode(),
        }
        inner = path.removeprefix(self._prefix)
        changed = {
            "scheme": "http",
            "client": ("127.0.0.1", 9),
            "path": inner,
            "raw_path": inner.encode(),
            "headers": [*kept, *added.items()],
        }
        await self._app({**scope, **changed}, receive, send)


def linked(text: str) -> set[str]:
    """Where a page leads on its own host."""
    parts = [part.split('"')[0] for part in text.replace('src="', 'href="').split('href="')[1:]]
    return {part for part in parts if part.startswith("/")}
