"""One-time links, invitations and the way to the first login."""

from __future__ import annotations

import signal
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest

from pinaivu_box.login.throttle import SignupThrottle
from tests.support.fake_model import FAKE
from tests.support.in_process_command import run_command, run_command_json
from tests.support.pages import PASSWORD, log_in, logged_in, make_account, make_owner, visitor
from tests.support.process_box import Box, StartBox
from tests.support.terminal import Terminal

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    return module_box("--model", f"{FAKE}=fake:1", config='[login]\nsignup = "invite"\n')


def token_of(link: str) -> str:
    return link.rpartition("/")[2].rpartition("=")[2]


def use(client: httpx.Client, token: str, password: str = PASSWORD) -> httpx.Response:
    return client.post("/v1/session/link", json={"token": token, "password": password})


def new_link(box: Box, name: str) -> str:
    return token_of(run_command("accounts", "link", name, home=box.home).stdout.strip())


def age_links(home: Path, minutes: int) -> None:
    database = sqlite3.connect(home / "pinaivu.db")
    with database:
        change = "UPDATE login_links SET expires_at = expires_at - ?, created_at = created_at - ?"
        database.execute(change, (minutes * 60_000, minutes * 60_000))
    database.close()


def test_the_way_to_the_first_login(box: Box) -> None:
    """In one test: what `/` says depends on what was before."""
    with visitor(box.url) as client:
        program = client.get("/", headers={"accept": "*/*"})
        assert program.json()["api"] == "/v1" and "Accept" in program.headers["vary"]
        welcome = client.get("/", headers=BROWSER)
        assert welcome.status_code == 200 and "pinaivu accounts link owner" in welcome.text
        assert "/login/link/" not in box.output  # that is no terminal

        printed = run_command("accounts", "link", "owner", home=box.home).stdout.strip()
        assert printed.startswith(("http://localhost:", "http://127.0.0.1:"))
        assert f":{box.url.rpartition(':')[2]}/login/link/" in printed
        token = token_of(printed)
        stored = b"".join(file.read_bytes() for file in box.home.glob("pinaivu.db*"))
        assert token.encode() not in stored
        for _ in range(2):  # looking does not use it up
            page = client.get(f"/login/link/{token}")
            assert page.status_code == 200 and "owner" in page.text
            assert "nobody can bring them back" in page.text  # the chats
        assert token not in box.errors  # the log

        begun = use(client, token)
        assert begun.status_code == 200 and begun.json()["next"] == "/dashboard"
        assert client.get("/v1/admin/keys").status_code == 200
        assert client.get("/", headers=BROWSER).headers["location"] == "/dashboard"
    with visitor(box.url) as client:
        assert client.get("/", headers=BROWSER).headers["location"] == "/login"
        again = use(client, token)
        assert again.status_code == 404 and "used already" in again.text
        assert client.get(f"/login/link/{token}").status_code == 404


def test_the_first_link_is_printed_on_a_terminal_until_somebody_has_a_password(
    tmp_path: Path,
) -> None:
    def start() -> Terminal:
        return Terminal("serve", "--port", "0", "--model", f"{FAKE}=fake:1", home=tmp_path / "home")

    with start() as terminal:
        terminal.expect("Log in")
        link = terminal.expect("(works once").strip()
        terminal.expect("Try it with curl")
        page = httpx.get(link, timeout=60, trust_env=False)
        assert page.status_code == 200 and "owner" in page.text
        with visitor(link.partition("/login")[0]) as client:
            assert use(client, token_of(link)).status_code == 200
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 0
    with start() as terminal:
        assert "/login/link/" not in terminal.expect("Try it with curl")


def test_a_link_ends_all_sessions_and_replaces_the_password(box: Box) -> None:
    make_account(box.home, "ada")
    with logged_in(box.url) as ada, visitor(box.url) as other:
        token = new_link(box, "ada")
        assert use(other, token, "another password").status_code == 200
        assert ada.get("/v1/usage").status_code == 401
    with visitor(box.url) as client:
        former = client.post("/v1/session", json={"name": "ada", "password": PASSWORD})
        assert former.status_code == 401
        log_in(client, "ada", "another password")


def test_a_link_works_for_15_minutes_and_until_there_is_another(box: Box) -> None:
    make_account(box.home, "bea")
    first, second = new_link(box, "bea"), new_link(box, "bea")
    with visitor(box.url) as client:
        assert use(client, first).status_code == 404
        age_links(box.home, 14)
        assert client.get(f"/login/link/{second}").status_code == 200
        age_links(box.home, 2)
        for answer in (use(client, second), client.get(f"/login/link/{second}")):
            assert answer.status_code == 404
        third = new_link(box, "bea")
        assert use(client, third, "short").status_code == 422  # and is not used up
        assert use(client, third).status_code == 200
        for wrong in ("", "x", third[:-1], "a" * 43):
            assert use(client, wrong).status_code in (403, 404)


def test_an_admin_makes_links_and_a_member_does_not(box: Box) -> None:
    make_owner(box.home)
    make_account(box.home, "cat")
    with logged_in(box.url, "cat") as member:
        assert member.post("/v1/admin/accounts/owner/link").status_code == 403
        assert member.post("/v1/admin/invitations").status_code == 403
    with logged_in(box.url, "owner") as owner, visitor(box.url) as client:
        made = owner.post("/v1/admin/accounts/cat/link").json()
        assert made["account"] == "cat" and made["url"].startswith(f"{box.url}/login/link/")
        assert use(client, token_of(made["url"])).json()["account"]["name"] == "cat"
    actions = [entry["action"] for entry in run_command_json("audit", home=box.home)]
    assert {"account.password_link", "account.passwd", "session.create"} <= set(actions)


def sign_up(client: httpx.Client, name: str, **more: Any) -> httpx.Response:
    return client.post("/v1/signup", json={"name": name, "password": PASSWORD, **more})


def test_an_invitation_makes_one_account(box: Box) -> None:
    make_account(box.home, "taken")
    token = token_of(run_command_json(
        "accounts", "invite", "--config", str(box.args[1]), home=box.home
    )["url"])  # fmt: skip
    with visitor(box.url) as client:
        assert sign_up(client, "dan").status_code == 403
        assert client.get("/signup").status_code == 404
        page = client.get(f"/signup?invitation={token}")
        assert page.status_code == 200 and f'data-signup="{token}"' in page.text
        assert use(client, token).status_code == 404  # it is for nobody's password
        assert sign_up(client, "taken", invitation=token).status_code == 409
        assert sign_up(client, "Not valid", invitation=token).status_code == 422
        begun = sign_up(client, "dan", invitation=token)
        assert begun.status_code == 200
        assert (begun.json()["account"]["role"], begun.json()["next"]) == ("member", "/chat")
        client.headers["x-csrf-token"] = begun.json()["csrf"]
        assert client.get("/v1/usage").status_code == 200
        assert client.get("/v1/admin/keys").status_code == 403
        assert sign_up(client, "eva", invitation=token).status_code == 404
    with visitor(box.url) as client:
        link = new_link(box, "dan")
        assert sign_up(client, "fay", invitation=link).status_code == 404
        log_in(client, "dan")


def test_who_may_sign_up_is_the_operator_s_to_say(
    box: Box, new_box: StartBox, tmp_path: Path
) -> None:
    closed = run_command("accounts", "invite", home=tmp_path / "empty", check=False)
    assert closed.returncode == 1 and "signup" in closed.stderr
    started = new_box("--model", f"{FAKE}=fake:1", config='[login]\nsignup = "open"\n')
    with visitor(started.url) as client:
        assert client.get("/signup").status_code == 200
    statuses = []
    for n in range(7):
        with visitor(started.url) as client:
            answer = sign_up(client, f"user{n}")
            statuses.append(answer.status_code)
    assert statuses == [200] * 5 + [429] * 2
    assert int(answer.headers["retry-after"]) > 60


def test_sign_ups_are_slowed_by_address_and_altogether() -> None:
    now = [0.0]
    throttle = SignupThrottle(lambda: now[0])
    for _ in range(5):
        throttle.attempt("192.0.2.1")
        now[0] += 60
    assert throttle.wait("192.0.2.1") == 3300 and throttle.wait("192.0.2.2") == 0
    now[0] += 3300
    assert throttle.wait("192.0.2.1") == 0
    for n in range(100):
        throttle.attempt(f"198.51.100.{n}")
    assert throttle.wait("192.0.2.2") == 3600
