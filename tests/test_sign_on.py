"""Single sign-on: a real provider, one that lies, and who gets which account."""

from __future__ import annotations

import asyncio
import hashlib
from base64 import b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from joserfc.jwk import OctKey
from starlette.applications import Starlette

from pinaivu_box import config, login_config
from pinaivu_box.box_services import open_box
from pinaivu_box.config import Config
from pinaivu_box.doctor import network
from pinaivu_box.login.oidc import account_names, person_of
from pinaivu_box.login_config import LoginConfig, OidcConfig
from pinaivu_box.policy import Policy
from pinaivu_box.server.app import create_app
from pinaivu_box.store import account_identities, accounts, login_links
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.new_keys import Draft, create
from tests.support.in_process_command import run_command
from tests.support.oidc_providers import (
    CLIENT_ID,
    SECRET,
    LyingProvider,
    approve,
    lying_provider,
    real_provider,
    set_user,
)

BY = Actor("test", "local")


@pytest.fixture(scope="module")
def real() -> Iterator[str]:
    with real_provider() as issuer:
        yield issuer


@pytest.fixture(scope="module")
def running_liar() -> Iterator[LyingProvider]:
    with lying_provider() as provider:
        yield provider


@pytest.fixture
def liar(running_liar: LyingProvider) -> LyingProvider:
    running_liar.reset()
    return running_liar


class Site:
    """A box with single sign-on, and browsers that use it."""

    def __init__(self, app: Starlette, box: Any) -> None:
        self.app, self.box = app, box

    @asynccontextmanager
    async def browser(
        self, peer: str = "127.0.0.1", **more: Any
    ) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app, client=(peer, 9))
        base = more.pop("base_url", "http://localhost:4001")
        async with httpx.AsyncClient(
            transport=transport, base_url=base, timeout=180, headers={"accept": "text/html"}, **more
        ) as client:
            yield client

    async def names(self) -> set[str]:
        return {account.name for account in await accounts.ls(self.box.database)}


@asynccontextmanager
async def site(home: Path, issuer: str, **oidc: Any) -> AsyncIterator[Site]:
    overrides: dict[tuple[str, ...], Any] = {
        ("login", "oidc", "issuer"): issuer,
        ("login", "oidc", "client_id"): CLIENT_ID,
        ("login", "oidc", "name"): "Lab login",
        ("server", "trusted_proxies"): ("192.0.2.1",),
    }
    secret = home.with_name("secret")
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.write_text(SECRET.replace(" ", "-"))
    secret.chmod(0o600)
    overrides |= {("login", "oidc", "client_secret_file"): str(secret)}
    everybody = not {"allowed_domains", "allowed_groups"} & oidc.keys()
    oidc = {"allow_everybody": everybody, **oidc}
    overrides |= {("login", "oidc", name): value for name, value in oidc.items()}
    load = partial(config.load, None, environ={}, overrides=overrides)
    async with open_box(load, home) as box:
        yield Site(create_app(box), box)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def asked(answer: httpx.Response) -> dict[str, str]:
    """What the browser is told to ask the provider for."""
    assert answer.status_code == 303, answer.text
    query = parse_qs(urlsplit(answer.headers["location"]).query)
    return {name: value[0] for name, value in query.items()}


async def log_in(browser: httpx.AsyncClient, subject: str, path: str = "") -> httpx.Response:
    """By the real provider; the answer to the callback."""
    begun = await browser.get(f"/login/oidc{path}")
    assert begun.status_code == 303, begun.text
    back = await asyncio.to_thread(approve, begun.headers["location"], subject)
    return await browser.get(back)


async def come_back(
    browser: httpx.AsyncClient, liar: LyingProvider, **changed: str
) -> httpx.Response:
    begun = asked(await browser.get("/login/oidc"))
    liar.nonce = liar.nonce or begun["nonce"]
    parameters = {"code": "c", "state": begun["state"], **changed}
    answer = await browser.get("/login/oidc/callback", params=parameters)
    liar.nonce = ""
    return answer


# -- a real provider -----------------------------------------------------------------------------


def test_a_person_logs_in_and_has_one_account_for_ever(tmp_path: Path, real: str) -> None:
    async def scenario() -> None:
        set_user(real, "s-ada", email="Ada@lab.example", email_verified=True)
        async with site(tmp_path / "home", real) as box:
            async with box.browser() as browser:
                shown = await browser.get("/login?next=/usage%3Fdays%3D7")
                assert "Lab login" in shown.text and "/login/oidc?next=" in shown.text
                done = await log_in(browser, "s-ada", "?next=/usage%3Fdays%3D7")
                assert (done.status_code, done.headers["location"]) == (303, "/usage?days=7")
                assert (await browser.get("/v1/models")).status_code == 200
            # The email address is another one's tomorrow; the account stays this one.
            set_user(real, "s-ada", email="countess@lab.example", email_verified=True)
            set_user(real, "s-eve", email="ada@lab.example", email_verified=True)
            async with box.browser() as browser:
                assert (await log_in(browser, "s-ada")).headers["location"] == "/chat"
            assert await box.names() == {"owner", "ada@lab.example"}
            async with box.browser() as browser:
                assert (await log_in(browser, "s-eve")).status_code == 303
            (other,) = await box.names() - {"owner", "ada@lab.example"}
            assert other.startswith("ada@lab.example-")

    run(scenario)


def test_the_first_admin_needs_no_password(tmp_path: Path, real: str) -> None:
    """By the one-time link of the owner's account, once; no other site can lead a browser there."""

    async def scenario() -> None:
        for subject in ("s-op", "s-ada"):
            set_user(real, subject, email=f"{subject}@lab.example", email_verified=True)
        async with site(tmp_path / "home", real) as box, box.browser() as browser:
            database = box.box.database
            owner = await accounts.find(database, accounts.OWNER)
            assert "pinaivu accounts link owner" in (await browser.get("/login")).text
            assert (await log_in(browser, "s-ada")).headers["location"] == "/chat"  # a member
            await accounts.create(database, "bob", "member", None, BY)
            of_bob = await login_links.create(database, await accounts.find(database, "bob"), BY)
            _, token = await login_links.create(database, owner, BY)
            assert "/login/oidc?link=" not in (await browser.get(f"/login/link/{of_bob[1]}")).text
            page = (await browser.get(f"/login/link/{token}")).text
            assert f"/login/oidc?link={token}" in page and "Lab login" in page
            afar = {"sec-fetch-site": "cross-site"}
            refused = await browser.get(f"/login/oidc?link={token}", headers=afar)
            assert refused.status_code == 403 and "another site" in refused.text
            for wrong in (of_bob[1], "x"):
                assert (await log_in(browser, "s-op", f"?link={wrong}")).status_code in (404, 409)
            async with box.browser() as operator:
                done = await log_in(operator, "s-op", f"?link={token}")
                assert (done.status_code, done.headers["location"]) == (303, "/dashboard")
                assert (await operator.get("/v1/admin/keys")).status_code == 200
            async with box.browser() as operator:
                assert (await log_in(operator, "s-op")).headers["location"] == "/dashboard"
                assert (await browser.get(f"/login/link/{token}")).status_code == 404
                assert "accounts link owner" not in (await operator.get("/logout")).text
            async with box.browser() as another:
                assert "accounts link owner" not in (await another.get("/login")).text
                _, token = await login_links.create(database, owner, BY)
                assert (await log_in(another, "s-ada", f"?link={token}")).status_code == 409
            assert await box.names() == {"owner", "bob", "s-ada@lab.example"}

    run(scenario)


def test_an_account_of_that_name_is_not_taken_over(tmp_path: Path, real: str) -> None:
    async def scenario() -> None:
        home = tmp_path / "home"
        set_user(real, "s-mal", preferred_username="owner")
        async with site(home, real) as box:
            local = await accounts.create(box.box.database, "bob@lab.example", "admin", None, BY)
            set_user(real, "s-bob", email="bob@lab.example", email_verified=True)
            for subject in ("s-mal", "s-bob"):
                async with box.browser() as browser:
                    assert (await log_in(browser, subject)).headers["location"] == "/chat"
            for subject, mine in (("s-mal", accounts.OWNER), ("s-bob", local.id)):
                found = await account_identities.find(box.box.database, real, subject)
                assert found is not None and found.id != mine and found.role == "member"
            # An admin may join the two.
            await account_identities.link(box.box.database, real, "s-bob", local, BY)
            async with box.browser() as browser:
                assert (await log_in(browser, "s-bob")).headers["location"] == "/dashboard"
            # And who is removed does not come in again.
            await accounts.remove(box.box.database, local, BY)
            async with box.browser() as browser:
                refused = await log_in(browser, "s-bob")
                assert refused.status_code == 403 and "was removed" in refused.text

    run(scenario)


def test_domains_and_groups_say_who_may_come_in_and_who_is_an_admin(
    tmp_path: Path, real: str
) -> None:
    verified = {"email_verified": True}
    lab, admins = {"groups": ["lab"]}, {"groups": ["lab", "admins"]}
    set_user(real, "g-admin", email="a@lab.example", **verified, **admins)
    set_user(real, "g-member", email="b@lab.example", **verified, **lab)
    set_user(real, "g-unverified", email="c@lab.example", **lab)
    set_user(real, "g-domain", email="d@lab.example.evil", **verified, **lab)
    set_user(real, "g-group", email="e@lab.example", **verified, groups="guests")

    async def scenario() -> None:
        async with site(
            tmp_path / "home", real, allowed_domains=("lab.example",), allowed_groups=("lab",),
            admin_groups=("admins",),
        ) as box:  # fmt: skip
            for subject, status, told in (
                ("g-admin", 303, "/dashboard"),
                ("g-member", 303, "/chat"),
                ("g-unverified", 403, "not verified"),
                ("g-domain", 403, "lab.example.evil"),
                ("g-group", 403, "none of the groups"),
            ):
                async with box.browser() as browser:
                    done = await log_in(browser, subject)
                    assert done.status_code == status, done.text
                    assert told in done.headers.get("location", done.text)
                    assert bool(browser.cookies.get("pinaivu_session")) == (status == 303)
            assert await box.names() == {"owner", "a@lab.example", "b@lab.example"}

    run(scenario)


def test_who_has_left_a_group_keeps_neither_an_admin_s_rights_nor_a_session(
    tmp_path: Path, real: str
) -> None:
    def groups(*names: str) -> None:
        set_user(real, "g-left", preferred_username="left", groups=list(names))

    async def scenario() -> None:
        async with (
            site(tmp_path / "home", real, allowed_groups=("lab",), admin_groups=("admins",)) as box,
            box.browser() as first,
            box.browser() as second,
            box.browser() as third,
        ):
            groups("lab", "admins")
            assert (await log_in(first, "g-left")).headers["location"] == "/dashboard"
            account = await accounts.find(box.box.database, "left")
            policy = Policy(scopes=("usage", "admin"))
            _, secret = await create(box.box.database, Draft("own", account.id, policy), BY)
            key = {"authorization": f"Bearer {secret}"}
            assert (await third.get("/v1/admin/keys", headers=key)).status_code == 200
            groups("lab")
            assert (await log_in(second, "g-left")).headers["location"] == "/chat"
            assert (await first.get("/v1/usage")).status_code == 401
            assert (await second.get("/v1/usage")).status_code == 200
            assert (await second.get("/v1/admin/keys")).status_code == 403
            assert (await third.get("/v1/admin/keys", headers=key)).status_code == 403
            assert (await third.get("/v1/usage", headers=key)).status_code == 200
            groups()
            assert (await log_in(third, "g-left")).status_code == 403
            assert (await second.get("/v1/usage")).status_code == 401

    run(scenario)


def test_that_everybody_may_come_in_has_to_be_said() -> None:
    def check(**oidc: Any) -> None:
        login_config.check(
            LoginConfig(oidc=OidcConfig(issuer="https://id.example", client_id="box", **oidc))
        )

    for lists in ({}, {"admin_groups": ("admins",)}):
        with pytest.raises(ValueError, match="allow_everybody = true"):
            check(**lists)
    check(allow_everybody=True)
    check(allowed_groups=("lab",))
    with pytest.raises(ValueError, match="leave one out"):
        check(allowed_domains=("lab.example",), allow_everybody=True)


# -- one that lies -------------------------------------------------------------------------------


def test_what_is_sent_is_what_the_standards_want(tmp_path: Path, liar: LyingProvider) -> None:
    async def scenario() -> None:
        async with site(tmp_path / "home", liar.issuer) as box, box.browser() as browser:
            begun = await browser.get("/login/oidc")
            sent = asked(begun)
            assert sent["redirect_uri"] == "http://localhost:4001/login/oidc/callback"
            assert (sent["response_type"], sent["client_id"]) == ("code", CLIENT_ID)
            assert sent["code_challenge_method"] == "S256"
            cookie = begun.headers["set-cookie"].lower()
            assert "httponly" in cookie and "samesite=lax" in cookie and "max-age=600" in cookie
            liar.nonce = sent["nonce"]
            done = await browser.get(
                "/login/oidc/callback", params={"code": "c", "state": sent["state"]}
            )
            assert done.status_code == 303, done.text
            digest = hashlib.sha256(liar.asked["code_verifier"].encode()).digest()
            assert urlsafe_b64encode(digest).rstrip(b"=").decode() == sent["code_challenge"]
            assert liar.asked["redirect_uri"] == sent["redirect_uri"]
            basic = b64decode(liar.asked["authorization"].removeprefix("Basic ")).decode()
            assert basic == f"{CLIENT_ID}:{SECRET.replace(' ', '-')}"
            # Behind a proxy, by the name and the path that it shows.
            forwarded = {
                "X-Forwarded-For": "203.0.113.1", "X-Forwarded-Proto": "https",
                "X-Forwarded-Host": "lab.example", "X-Forwarded-Prefix": "/box",
            }  # fmt: skip
        async with (
            site(tmp_path / "home", liar.issuer) as box,
            box.browser("192.0.2.1") as browser,
        ):
            begun = await browser.get("/login/oidc", headers=forwarded)
            assert asked(begun)["redirect_uri"] == "https://lab.example/box/login/oidc/callback"
            cookie = begun.headers["set-cookie"].lower()
            assert "path=/box/login/oidc;" in cookie and "secure" in cookie

    run(scenario)


LIES: dict[str, dict[str, Any]] = {
    "another nonce": {"claims": {"nonce": "another"}},
    "no nonce": {"claims": {"nonce": None}},
    "another audience": {"claims": {"aud": "others"}},
    "one of several audiences": {"claims": {"aud": [CLIENT_ID, "others"]}},
    "for another party": {"claims": {"azp": "others"}},
    "no audience": {"claims": {"aud": None}},
    "another issuer": {"claims": {"iss": "https://evil.example"}},
    "expired": {"claims": {"exp": 1_600_000_000}},
    "no expiry": {"claims": {"exp": None}},
    "from the future": {"claims": {"iat": 4_000_000_000, "nbf": 4_000_000_000}},
    "no subject": {"claims": {"sub": None}},
    "a subject of another kind": {"claims": {"sub": ["ada"]}},
    "an empty subject": {"claims": {"sub": ""}},
    "a subject without end": {"claims": {"sub": "a" * 300}},
    "no signature": {"header": {"alg": "none"}},
    "signed with the client's secret": {
        "header": {"alg": "HS256", "kid": "first"},
        "key": OctKey.import_key(SECRET.replace(" ", "-"), {"kid": "first"}),
    },
    "another access token": {"claims": {"at_hash": "AAAAAAAAAAAAAAAAAAAAAA"}},
    "userinfo of another person": {"userinfo": {"sub": "eve"}},
}


def test_no_lie_logs_anybody_in(tmp_path: Path, liar: LyingProvider) -> None:
    async def scenario() -> None:
        async with site(tmp_path / "home", liar.issuer) as box:
            lies = {
                **LIES,
                "a key of somebody else": {"key": liar.foreign_key()},
                "one that claims a known id": {"key": liar.foreign_key("first")},
            }
            for name, lie in lies.items():
                liar.reset()
                for what, value in lie.items():
                    setattr(liar, what, value)
                async with box.browser() as browser:
                    answer = await come_back(browser, liar)
                    assert answer.status_code == 401, (name, answer.text)
                    assert "try again" in answer.text, name
                    assert not browser.cookies.get("pinaivu_session"), name
            assert await box.names() == {"owner"}
            liar.reset()
            async with box.browser() as browser:
                assert (await come_back(browser, liar)).status_code == 303

    run(scenario)


def test_a_login_that_began_elsewhere_leads_nowhere(tmp_path: Path, liar: LyingProvider) -> None:
    async def scenario() -> None:
        async with site(tmp_path / "home", liar.issuer) as box, box.browser() as browser:
            for changed in (
                {"state": "another"}, {"code": ""}, {"error": "access_denied"},
                {"iss": "https://evil.example"},
            ):  # fmt: skip
                answer = await come_back(browser, liar, **changed)
                assert answer.status_code == 401, changed
                assert "start again" in answer.text
            begun = asked(await browser.get("/login/oidc"))
            async with box.browser() as another:  # which has not the cookie
                parameters = {"code": "c", "state": begun["state"]}
                answer = await another.get("/login/oidc/callback", params=parameters)
                assert answer.status_code == 401
            # The cookie counts once.
            liar.nonce = begun["nonce"]
            assert (await browser.get("/login/oidc/callback", params=parameters)).is_redirect
            again = await browser.get("/login/oidc/callback", params=parameters)
            assert again.status_code == 401

    run(scenario)


def test_new_keys_are_found_and_unknown_ones_are_not_looked_for_without_end(
    tmp_path: Path, liar: LyingProvider
) -> None:
    async def scenario() -> None:
        async with site(tmp_path / "home", liar.issuer) as box:
            async with box.browser() as browser:
                assert (await come_back(browser, liar)).status_code == 303
            provider = box.box.sign_on.provider(
                box.box.config.login.oidc, box.box.settings.current.oidc_secret
            )
            now = provider._clock()
            liar.looks, liar.key = 0, liar.foreign_key()
            for _ in range(5):
                async with box.browser() as browser:
                    assert (await come_back(browser, liar)).status_code == 401
            assert liar.looks == 0  # its keys were had just now
            provider._clock = lambda: now + 90
            liar.key = liar.new_key()
            async with box.browser() as browser:
                assert (await come_back(browser, liar)).status_code == 303
            assert liar.looks == 1

    run(scenario)


def test_a_provider_that_fails_is_told_and_passwords_still_work(
    tmp_path: Path, liar: LyingProvider
) -> None:
    password = "correct horse battery"

    async def scenario() -> None:
        failures: list[dict[str, Any]] = [
            {"broken": "/.well-known/openid-configuration"},
            {"description": {"issuer": "https://evil.example"}},
            {"description": {"authorization_endpoint": "javascript:alert(1)"}},
            {"description": {"token_endpoint": None}},
        ]
        async with site(tmp_path / "home", liar.issuer) as box:
            await accounts.create(box.box.database, "carl", "member", password, BY)
            for failure in failures:
                liar.reset()
                for what, value in failure.items():
                    setattr(liar, what, value)
                async with box.browser() as browser:
                    answer = await browser.get("/login/oidc")
                    assert answer.status_code == 503, failure
                    assert "Lab login does not work now" in answer.text
                    body = {"name": "carl", "password": password}
                    assert (await browser.post("/v1/session", json=body)).status_code == 200
            for path in ("/token", "/keys", "/userinfo"):
                liar.reset()
                liar.broken = path
                async with box.browser() as browser:
                    assert (await come_back(browser, liar)).status_code == 503, path
                liar.reset()
            for refusal, status, told in (
                ("invalid_client", 503, "client_id of this box"),
                ("invalid_grant", 401, "refused this login"),
            ):
                liar.refusal = refusal
                async with box.browser() as browser:
                    answer = await come_back(browser, liar)
                    assert answer.status_code == status and told in answer.text
            liar.reset()
        async with site(tmp_path / "home", "http://127.0.0.1:1") as box, box.browser() as browser:
            answer = await browser.get("/login/oidc")
            assert answer.status_code == 503 and "does not answer" in answer.text

    run(scenario)


def test_doctor_asks_the_provider(liar: LyingProvider) -> None:
    def told(issuer: str) -> list[str]:
        oidc = OidcConfig(issuer=issuer, client_id=CLIENT_ID)
        return [each.state for each in network.sign_on(Config(login=LoginConfig(oidc=oidc)))]

    assert told("") == []
    assert told(liar.issuer) == ["ok"]
    assert told("http://127.0.0.1:1") == ["warning"]


def test_without_a_provider_there_is_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path / "home", "") as box, box.browser() as browser:
            assert (await browser.get("/login/oidc")).status_code == 404
            assert "/login/oidc" not in (await browser.get("/login")).text

    run(scenario)


def test_plain_http_from_elsewhere_is_refused(tmp_path: Path, liar: LyingProvider) -> None:
    async def scenario() -> None:
        async with site(tmp_path / "home", liar.issuer) as box, box.browser("203.0.113.9") as one:
            answer = await one.get("/login/oidc")
            assert answer.status_code == 403 and "https" in answer.text

    run(scenario)


# -- names and links -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "name"),
    [
        ({"email": "Ada@Lab.Example", "email_verified": True}, "ada@lab.example"),
        ({"email": "ada@lab.example", "preferred_username": "ada l"}, "ada-l"),
        ({"preferred_username": "boss@lab.example"}, "boss.lab.example"),
        ({"preferred_username": "acct_owner"}, "user-acct_owner"),
        ({"preferred_username": "\u202e<script>"}, "script"),
        ({"preferred_username": "…"}, "user"),
        ({"email": ["x"], "email_verified": "true", "groups": 5}, "user"),
        ({"preferred_username": "a" * 500}, "a" * 56),
    ],
)
def test_names_of_accounts_are_valid(claims: dict[str, Any], name: str) -> None:
    names = account_names(person_of({"sub": "s", **claims}, "https://id.example"))
    first, second = next(names), next(names)
    accounts.check_name(first)
    accounts.check_name(second)
    assert first == name and second != first and second.startswith(name[:56])


def test_an_admin_links_and_unlinks_by_command(tmp_path: Path) -> None:
    home = tmp_path / "home"
    run_command("accounts", "create", "ada", home=home)
    refused = run_command("accounts", "link-oidc", "ada", "s-1", home=home, check=False)
    assert refused.returncode == 2 and "no issuer" in refused.stderr
    (home / "config.toml").write_text(
        '[login.oidc]\nissuer = "https://id.example"\nclient_id = "box"\nallow_everybody = true\n'
    )
    run_command("accounts", "link-oidc", "ada", "s-1", home=home)
    assert "account.link" in run_command("audit", home=home).stdout
    assert run_command("accounts", "unlink-oidc", "ada", home=home)
    again = run_command("accounts", "unlink-oidc", "ada", home=home, check=False)
    assert again.returncode == 1 and "Nobody logs in" in again.stderr
