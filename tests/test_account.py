"""What an account does by itself: its password, its sessions, its own keys."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from ulid import ULID

from pinaivu_box.errors import RateLimited, RowConflict
from pinaivu_box.policy import Budget, Policy
from pinaivu_box.policy_bounds import excess, within
from pinaivu_box.server.pages.own import browser_name
from pinaivu_box.store import accounts, sessions
from pinaivu_box.store.audit import BOX
from pinaivu_box.store.database import Database
from pinaivu_box.store.times import now_ms
from tests.support.fake_model import FAKE
from tests.support.in_process_command import run_command, run_command_json
from tests.support.pages import PASSWORD, log_in, logged_in, make_account, make_owner, visitor
from tests.support.process_box import Box, StartBox

NEW = "another long password"


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    started = module_box("--model", f"{FAKE}=fake:1")
    make_owner(started.home)
    return started


def with_key(box: Box, secret: str, method: str, path: str, body: Any = None) -> httpx.Response:
    return box.http(method, path, key=secret, json=body)


def pages_key(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/v1/account").json()["pages_key"]
    return found


def limit(box: Box, client: httpx.Client, **policy: Any) -> None:
    """An admin limits the pages of the account."""
    path = f"/v1/admin/keys/{pages_key(client)['id']}"
    assert box.http("PATCH", path, json={"policy": policy}).status_code == 200


def create(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/account/keys", json=body)


# -- password and sessions -------------------------------------------------------------------------


def test_a_password_change_ends_all_sessions_also_a_stolen_copy_of_one_s_own(box: Box) -> None:
    make_account(box.home, "ada")
    with logged_in(box.url) as ada, logged_in(box.url) as other, visitor(box.url) as thief:
        thief.cookies.update(dict(ada.cookies))
        assert thief.get("/v1/usage").status_code == 200
        wrong = ada.post("/v1/account/password", json={"current": "wrong", "new": NEW})
        assert wrong.status_code == 403 and wrong.json()["error"]["code"] == "wrong_secret"
        body = {"current": PASSWORD, "new": NEW}
        changed = ada.post("/v1/account/password", json=body)
        assert changed.status_code == 200, changed.text
        ada.headers["x-csrf-token"] = changed.json()["session"]["csrf"]
        assert ada.post("/v1/account/keys", json={}).status_code == 200
        assert thief.get("/v1/usage").status_code == 401
        assert other.get("/v1/usage").status_code == 401
    with visitor(box.url) as client:
        assert client.post(
            "/v1/session", json={"name": "ada", "password": PASSWORD}
        ).status_code == 401  # fmt: skip
        log_in(client, "ada", NEW)


def test_a_password_change_undoes_no_reset_that_came_between(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Database(tmp_path / "box.db") as database:
            account = await accounts.create(database, "ada", "member", PASSWORD, BOX)
            known = await accounts.verify_password(database, "ada", PASSWORD)
            assert known is not None
            await accounts.set_password(database, account, NEW, BOX)
            session, token = await sessions.create(
                database, account.id, address="127.0.0.1", user_agent=""
            )
            with pytest.raises(RowConflict, match="changed meanwhile"):
                await accounts.change_password(
                    database, account, "the thief's password", BOX, checked=known[1]
                )
            assert await accounts.check_password(database, "ada", NEW) is not None
            assert await sessions.find(database, token) == session

    asyncio.run(scenario())


def test_one_account_does_not_keep_those_who_log_in_waiting(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Database(tmp_path / "box.db") as database:
            await accounts.create(database, "ada", "member", PASSWORD, BOX)
            hogs = [accounts.hash_password(PASSWORD, "acct_hog") for _ in range(40)]
            login = asyncio.create_task(accounts.check_password(database, "ada", PASSWORD))
            results = await asyncio.gather(*hogs, return_exceptions=True)
            assert await login is not None
            refused = [one for one in results if isinstance(one, RateLimited)]
            assert 0 < len(results) - len(refused) < 10
            await accounts.hash_password(PASSWORD, "acct_hog")  # its turn comes again

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["admin", "command", "removed"])
def test_what_an_admin_does_to_an_account_ends_its_sessions(box: Box, how: str) -> None:
    make_account(box.home, f"bob-{how}")
    with logged_in(box.url, f"bob-{how}") as bob:
        path = f"/v1/admin/accounts/bob-{how}"
        if how == "admin":
            box.http("PATCH", path, json={"password": NEW})
        elif how == "removed":
            box.http("DELETE", path)
        else:
            run_command(
                "accounts", "passwd", f"bob-{how}", "--password-stdin", home=box.home, input=NEW
            )
        assert bob.get("/v1/usage").status_code == 401


def test_sessions_are_listed_and_ended(box: Box) -> None:
    make_account(box.home, "cleo")
    make_account(box.home, "dina")
    with logged_in(box.url, "cleo") as one, logged_in(box.url, "cleo") as two:
        listed = one.get("/v1/account/sessions").json()["data"]
        assert [session["current"] for session in listed] == [False, True]
        assert listed[0]["address"] == "127.0.0.1" and "httpx" in listed[0]["user_agent"]
        with logged_in(box.url, "dina") as dina:
            path = f"/v1/account/sessions/{listed[0]['id']}"
            assert dina.delete(path).status_code == 404
        assert one.delete(path).status_code == 200
        assert two.get("/v1/usage").status_code == 401
        with logged_in(box.url, "cleo") as three:
            assert one.delete("/v1/account/sessions").json()["ended"] == 1
            assert three.get("/v1/usage").status_code == 401
        secret = create(one, policy={"scopes": ["account"]}).json()["key"]
        assert with_key(box, secret, "GET", "/v1/account").status_code == 200
        assert with_key(box, secret, "GET", "/v1/account/sessions").status_code == 401
    trail = run_command_json("audit", "--target", "cleo", home=box.home)
    assert any(entry["actor_name"] == "cleo" for entry in trail)


def test_the_page_of_an_account_needs_a_session(box: Box) -> None:
    make_account(box.home, "emma")
    with visitor(box.url) as client:
        answer = client.get("/account?x=1")
        assert answer.status_code == 303
        assert answer.headers["location"] == "/login?next=%2Faccount%3Fx%3D1"
        log_in(client, "emma")
        page = client.get("/account")
        assert page.status_code == 200 and "emma" in page.text and "This one" in page.text


@pytest.mark.parametrize(
    ("user_agent", "name"),
    [
        (
            "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
            "Firefox on Linux",
        ),
        (
            "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko)"
            " Chrome/140.0.0.0 Safari/537.36 Edg/140.0.0.0",
            "Edge on Windows",
        ),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) AppleWebKit/605.1.15 (KHTML,"
            " like Gecko) Version/18.0 Mobile/15E148 Safari/604.1",
            "Safari on iPhone",
        ),
        ("curl/8.5.0", "curl/8.5.0"),
        ("", "unknown"),
    ],
)
def test_browsers_have_short_names(user_agent: str, name: str) -> None:
    assert browser_name(user_agent) == name


def test_the_token_of_commands_has_no_account(box: Box) -> None:
    token = json.loads((box.home / "run.json").read_text())["token"]
    assert with_key(box, token, "GET", "/v1/account").status_code == 403


# -- own keys --------------------------------------------------------------------------------------


def test_an_account_has_keys_of_its_own(box: Box) -> None:
    make_account(box.home, "fred")
    with logged_in(box.url, "fred") as fred:
        made = create(fred, name="laptop").json()
        assert made["policy"]["scopes"] == ["inference", "usage", "receipts"]
        chat = {"model": FAKE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        answer = with_key(box, made["key"], "POST", "/v1/chat/completions", chat)
        assert answer.status_code == 200
        path = f"/v1/account/keys/{made['id']}"
        rotated = fred.post(f"{path}/rotate", json={"overlap": "0"}).json()["key"]
        assert with_key(box, made["key"], "GET", "/v1/usage").status_code == 401
        assert with_key(box, rotated, "GET", "/v1/usage").status_code == 200
        assert fred.patch(path, json={"policy": {"rpm": 3}}).json()["policy"]["rpm"] == 3
        names = [key["name"] for key in fred.get("/v1/account/keys").json()["data"]]
        assert names == ["laptop", "pages"]
        assert fred.post(f"{path}/revoke").json()["state"] == "revoked"
        assert with_key(box, rotated, "GET", "/v1/usage").status_code == 401


def test_keys_of_others_and_the_pages_key_are_not_one_s_own(box: Box) -> None:
    make_account(box.home, "gina")
    make_account(box.home, "hugo")
    with logged_in(box.url, "gina") as gina, logged_in(box.url, "hugo") as hugo:
        of_gina = create(gina).json()["id"]
        for key_id, status in ((of_gina, 404), (pages_key(hugo)["id"], 409)):
            path = f"/v1/account/keys/{key_id}"
            assert hugo.patch(path, json={"name": "x"}).status_code == status
            assert hugo.post(f"{path}/rotate").status_code == status
            assert hugo.post(f"{path}/revoke").status_code == status


def test_own_keys_may_do_no_more_than_the_pages(box: Box) -> None:
    make_account(box.home, "iris")
    with logged_in(box.url, "iris") as iris:
        limit(box, iris, rpm=10, models=["fake:*"], budget={"amount": "5", "period": "30d"})
        refused = [
            create(iris, policy={"scopes": ["admin"]}),
            create(iris, policy={"rpm": 11}),
            create(iris, policy={"models": ["*"]}),
            create(iris, policy={"budget": {"amount": "5", "period": "1d"}}),
            create(iris, policy={"prices": {"*": "0"}}),
        ]
        for answer in refused:
            assert answer.status_code == 422 and "ask an admin" in answer.text, answer.text
        part = {"budget": {"amount": "3", "period": "30d"}, "rpm": 6}
        made = create(iris, policy=part).json()
        assert made["policy"]["models"] == ["fake:*"]
        assert "budgets" in create(iris, policy={**part, "rpm": 1}).text  # 6 of 5 together
        rest = create(iris).json()["policy"]
        assert (rest["budget"], rest["rpm"]) == ({"amount": "2", "period": "30d"}, 4)
        path = f"/v1/account/keys/{made['id']}"
        for policy in ({"rpm": 7}, {"models": ["*"]}, {"scopes": ["admin"]}):
            assert iris.patch(path, json={"policy": policy}).status_code == 422
        for name in ("rpm", "budget", "models"):  # what a new key would have in its place
            reset = iris.patch(path, json={"policy": {name: None}})
            assert reset.json()["policy"][name] == made["policy"][name], reset.text
        box.http("PATCH", f"/v1/admin/keys/{made['id']}", json={"policy": {"rpm": 99}})
        assert iris.patch(path, json={"name": "kept"}).json()["policy"]["rpm"] == 99


def test_models_scopes_and_expiry_of_own_keys_are_changed_within_bounds(box: Box) -> None:
    make_account(box.home, "ines")
    with logged_in(box.url, "ines") as ines:
        limit(box, ines, models=["fake:*", "tiny:1b"])
        text = ines.get("/keys").text
        assert 'value="account"' in text and 'value="admin"' not in text
        assert "fake:*, tiny:1b" in text  # what a key that names no models may use
        made = create(ines, policy={"models": [FAKE], "scopes": ["inference"]}).json()
        chat = {"model": FAKE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        path = f"/v1/account/keys/{made['id']}"
        later = "2100-01-01T00:00:00Z"
        for body, told in (
            ({"policy": {"models": ["tiny:1b"]}}, "only what fits tiny:1b"),
            ({"policy": {"models": None, "scopes": ["usage"]}}, "scope"),
            ({"policy": {"scopes": ["inference", "local-only"]}, "expires_at": later}, "choices"),
        ):
            changed = ines.patch(path, json=body)
            assert changed.status_code == 200, changed.text
            asked = with_key(box, made["key"], "POST", "/v1/chat/completions", chat)
            assert told in asked.text
        row = ines.get("/keys").text.partition(made["id"])[2].partition("</tr>")[0]
        assert "inference, local-only" in row and f'data-expires="{later[:10]}' in row
        expires = f"/v1/admin/keys/{pages_key(ines)['id']}"
        assert box.http("PATCH", expires, json={"expires_at": "2099-01-01T00:00:00Z"}).is_success
        refused = ines.patch(path, json={"expires_at": None})
        assert refused.status_code == 422 and "no other may later" in refused.text


def test_the_limits_of_own_keys_are_shared_out(box: Box) -> None:
    make_account(box.home, "kim")
    with logged_in(box.url, "kim") as kim:
        limit(box, kim, rpm=10, max_parallel=4)
        first = create(kim, policy={"rpm": 8, "max_parallel": 2}).json()
        path = f"/v1/account/keys/{first['id']}"
        for answer in (
            create(kim, policy={"rpm": 3}),
            kim.patch(path, json={"policy": {"rpm": 11}}),
        ):
            assert answer.status_code == 422
        second = create(kim).json()
        assert (second["policy"]["rpm"], second["policy"]["max_parallel"]) == (2, 2)
        # What the first has used in this minute is not there to be used again.
        assert kim.patch(path, json={"policy": {"rpm": 1}}).status_code == 200
        refused = kim.patch(
            f"/v1/account/keys/{second['id']}", json={"policy": {"rpm": 9, "max_parallel": 2}}
        )
        assert refused.status_code == 422 and "another minute" in refused.text
        assert kim.post(f"{path}/revoke").status_code == 200
        assert create(kim).status_code == 422


def test_many_requests_at_once_share_out_a_budget_once(box: Box) -> None:
    make_account(box.home, "lena")
    with logged_in(box.url, "lena") as lena:
        limit(box, lena, budget={"amount": "5"})
        body = {"policy": {"budget": {"amount": "2"}}}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: create(lena, **body).status_code, range(8)))
        assert sorted(answers) == [200] * 2 + [422] * 6


def test_an_account_gets_so_many_keys_in_a_day(box: Box) -> None:
    account = make_account(box.home, "mona")
    with logged_in(box.url, "mona") as mona:
        assert create(mona).status_code == 200
        database = sqlite3.connect(box.home / "pinaivu.db")
        with database:
            database.executemany(
                "INSERT INTO keys (id, account_id, hash, prefix, last_four, name, policy,"
                " created_at, revoked_at) VALUES (?, ?, randomblob(32), 'sk', '', '', '{}', ?, ?)",
                [(f"key_{ULID()}".lower(), account, now_ms(), now_ms()) for _ in range(200)],
            )
        database.close()
        assert create(mona).status_code == 429


def test_a_limited_key_makes_no_keys_that_would_multiply_its_limits(box: Box) -> None:
    make_account(box.home, "nora")
    with logged_in(box.url, "nora") as nora:
        other = create(nora).json()["id"]
        path = f"/v1/account/keys/{other}"
        for limits in ({"rpm": 5}, {"budget": {"amount": "1"}}, {"max_parallel": 1}):
            policy = {"scopes": ["account", "inference"], **limits}
            secret = create(nora, policy=policy).json()["key"]
            for method, at, body in (
                ("POST", "/v1/account/keys", {"policy": policy}),
                ("PATCH", path, {"policy": {"rpm": 1}}),
                ("POST", f"{path}/rotate", {}),
            ):
                assert with_key(box, secret, method, at, body).status_code == 403
            assert with_key(box, secret, "GET", "/v1/account/keys").status_code == 200


def test_a_session_gets_no_secret_of_a_key_that_may_do_more_than_itself(box: Box) -> None:
    make_account(box.home, "olga")
    with logged_in(box.url, "olga") as olga:
        limit(box, olga, rpm=10)
        body = {"account": "olga", "policy": {"rpm": 99}}
        stronger = box.http("POST", "/v1/admin/keys", json=body).json()
        rotation = olga.post(f"/v1/account/keys/{stronger['id']}/rotate")
        assert rotation.status_code == 422 and "key" not in rotation.json()


def test_who_was_given_a_limited_key_has_no_more_on_pages(box: Box) -> None:
    make_account(box.home, "jane")
    policy = {"rpm": 7, "models": ["fake:*"], "scopes": ["inference", "local-only"]}
    body = {"account": "jane", "policy": policy, "expires_at": "2060-01-01T00:00:00Z"}
    assert box.http("POST", "/v1/admin/keys", json=body).status_code == 200
    with logged_in(box.url, "jane") as jane:
        made = pages_key(jane)
        assert (made["policy"]["rpm"], made["policy"]["models"]) == (7, ["fake:*"])
        assert made["policy"]["scopes"] == [
            *("inference", "usage", "receipts", "account", "local-only")
        ]
        assert made["expires_at"] == "2060-01-01T00:00:00.000Z"
        own = create(jane).json()
        assert own["expires_at"] == made["expires_at"] and "local-only" in own["policy"]["scopes"]


def test_a_key_makes_and_rotates_no_key_that_may_do_more_than_itself(box: Box) -> None:
    with logged_in(box.url, "owner") as owner:
        admins = create(owner, policy={"scopes": ["admin"]}).json()
        few = create(owner, policy={"scopes": ["account", "usage"]}).json()["key"]
        path = "/v1/account/keys"
        for scopes in (["admin"], ["inference"]):
            body = {"policy": {"scopes": scopes}}
            assert with_key(box, few, "POST", path, body).status_code == 422
        rotation = with_key(box, few, "POST", f"{path}/{admins['id']}/rotate")
        assert rotation.status_code == 422 and "key" not in rotation.json()
        made = with_key(box, few, "POST", path, {})
        assert made.json()["policy"]["scopes"] == ["usage"]


BOUNDS: list[tuple[Policy, Policy, str | None]] = [
    (Policy(models=("a*",)), Policy(models=("a*", "b")), None),
    (Policy(models=("ab*",)), Policy(models=("a*",)), None),
    (Policy(models=("a:1",)), Policy(models=("a?1",)), None),
    (Policy(models=("a*",)), Policy(models=("a?",)), "models"),
    (Policy(models=("[a]b",)), Policy(models=("[ab",)), "models"),
    (Policy(), Policy(models=("a",)), "models"),
    (Policy(networks=("10.1.0.0/16",)), Policy(networks=("10.0.0.0/8",)), None),
    (Policy(networks=("::/0",)), Policy(networks=("10.0.0.0/8",)), "networks"),
    (Policy(), Policy(networks=("10.0.0.0/8",)), "networks"),
    (Policy(tpm=5), Policy(tpm=5), None),
    (Policy(max_parallel=1, max_queue=9), Policy(max_parallel=1), "max_queue"),
    (Policy(weight=2.0), Policy(), "weight"),
    (Policy(), Policy(scopes=("inference", "usage", "receipts", "local-only")), "scopes"),
    (Policy(routing="never"), Policy(routing="never"), None),
    (Policy(), Policy(peers=("one",)), "peers"),
    (Policy(budget=Budget("1")), Policy(budget=Budget("2", "30d")), None),
    (Policy(budget=Budget("1", "30d")), Policy(budget=Budget("2")), "budget"),
    (Policy(budget=Budget("2", "60d")), Policy(budget=Budget("2", "30d")), None),
]


@pytest.mark.parametrize(("policy", "allowed", "setting"), BOUNDS)
def test_what_exceeds_a_policy(policy: Policy, allowed: Policy, setting: str | None) -> None:
    found = excess(policy, allowed)
    assert (found and found[0]) == setting
    if policy == Policy():  # what names nothing has what is allowed
        assert excess(within(policy, allowed), allowed) is None
