"""What somebody meets who uses a box for the first time: mistyped addresses, commands and keys."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pinaivu_box.config import load
from pinaivu_box.errors import CliError
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import PINAIVU, Box, environment, on_terminal

CONTACT = "help@example.org"
CONFIG = f"""
[server]
contact = "{CONTACT}"
drain_seconds = 60.0
[pricing]
per_1k_tokens = "1"
[[model]]
name = "fast:1"
path = "fake:0"
[[model]]
name = "slow:1"
path = "fake:20"
"""
HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("first") / "home"
    made.mkdir()
    (made / "config.toml").write_text(CONFIG)
    return made


@pytest.fixture(scope="module")
def fresh(home: Path) -> Iterator[Box]:
    started = Box(home).start()
    yield started
    started.end()


def ask(box: Box, key: str | None = None, model: str = "fast:1", **more: Any) -> httpx.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": 4, **more}
    return box.http("POST", "/v1/chat/completions", key=key, json=body)


# -- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("/v1/chat/completion", "POST /v1/chat/completions"),
        ("/v1/chats/completions", "POST /v1/chat/completions"),
        ("/chat/completions", "POST /v1/chat/completions"),
        ("/api/v1/chat/completions", "POST /v1/chat/completions"),
        ("/v1/completion", "POST /v1/completions"),
        ("/v1/embedding", "POST /v1/embeddings"),
        ("/v1/model", "GET /v1/models"),
        ("/models", "GET /v1/models"),
        ("/v1/receipt/req_01m8jwk5kranhn94ddatdx7kjt", "GET /v1/receipts/{id}"),
        ("/v1/admin/key", "GET /v1/admin/keys"),
        ("/v1/response", "POST /v1/responses"),
        ("/healthz", "GET /health"),
        ("/doc", "GET /docs"),
    ],
)
def test_an_address_that_is_none_names_the_nearest(fresh: Box, path: str, near: str) -> None:
    answer = fresh.http("GET", path)
    assert answer.status_code == fresh.http("POST", path, json={}).status_code == 404
    error = answer.json()["error"]
    assert f"There is no {path} here." in error["message"] and near in error["message"]
    assert error["code"] == "not_found" and answer.json()["detail"] == error["message"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/signin", None),
        ("/login/link", None),
        ("/doc", None),
        ("/explorer/r", None),
        ("/v1/sesion", "POST /v1/session"),
        ("/v1/admin/key", "POST /v1/admin/keys"),
        ("/v1/model", "GET /v1/models"),
    ],
)
def test_no_page_is_named_to_a_program_that_sends_something(
    fresh: Box, path: str, expected: str | None
) -> None:
    message = fresh.http("POST", path, json={}).json()["error"]["message"]
    named = re.findall(r"(?:GET|POST|PATCH|DELETE) (/[^ ?]*)", message)
    assert all(one.startswith(("/v1/", "/api/")) for one in named), message
    assert expected is None or f"mean {expected}" in message


@pytest.mark.parametrize("path", ["/v1/zzzz", "/wp-login.php", "/v1/a/b/c/d/e/f/g"])
def test_an_unknown_path_without_a_near_one_names_some_paths(fresh: Box, path: str) -> None:
    message = fresh.http("GET", path).json()["error"]["message"]
    assert "/v1/chat/completions" in message and "/docs" in message


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", {"POST"}),
        ("PUT", "/v1/responses/resp_1", {"GET", "DELETE"}),
        ("PUT", "/v1/admin/keys/key_1", {"GET", "PATCH"}),
        ("DELETE", "/v1/models", {"GET"}),
    ],
)
def test_a_wrong_method_is_told_all_that_fit(
    fresh: Box, method: str, path: str, allowed: set[str]
) -> None:
    answer = fresh.http(method, path)
    assert answer.status_code == 405
    assert set(answer.headers["Allow"].split(", ")) == allowed
    assert all(one in answer.json()["error"]["message"] for one in allowed)


# -- whom to ask -----------------------------------------------------------------------------------


def test_refusals_of_the_operator_name_whom_to_ask(fresh: Box) -> None:
    """402, 403, 429 and 503 do, in every shape and in streams; other errors do not."""
    home = fresh.home

    def key(*options: str) -> str:
        return str(run_command_json("keys", "create", *options, home=home)["key"])

    narrow, seldom = key("--model", "no*"), key("--rpm", "1")
    ask(fresh, seldom)
    once = key("--budget", "0.014")
    while (spent := ask(fresh, once)).status_code == 200:
        pass
    found = {
        402: spent,
        403: ask(fresh, narrow),
        429: ask(fresh, seldom),
        503: ask(fresh, model="slow:1", max_tokens=400, pinaivu={"timeout": 0.000001}),
    }
    for status, answer in found.items():
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"].endswith(f" Contact: {CONTACT}")
        assert CONTACT in str(answer.json()["detail"])
    blocked = run_command_json("keys", "create", home=home)
    run_command("keys", "edit", blocked["id"], "--block", "unpaid", home=home)
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/usage"):
        answer = fresh.http("GET", path, key=blocked["key"])
        assert answer.status_code == 403 and CONTACT in answer.json()["error"]["message"]
    for answer in (
        ask(fresh, "sk-pnv-none"), ask(fresh, model="no:1"), ask(fresh, temperature=9),
        fresh.http("GET", "/v1/nothing"),
    ):  # fmt: skip
        assert answer.status_code in (400, 401, 404, 422) and CONTACT not in answer.text


@pytest.mark.parametrize(
    "contact", ["nobody", "two words@example.org", "ftp://example.org", "a@b c"]
)
def test_a_contact_is_a_mail_address_or_a_url(tmp_path: Path, contact: str) -> None:
    config = tmp_path / "box.toml"
    config.write_text(f'[server]\ncontact = "{contact}"\n')
    with pytest.raises(CliError) as refused:
        load(config, environ={})
    assert "server.contact" in refused.value.message and contact in refused.value.message


# -- receipts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def receipts(fresh: Box) -> dict[str, Any]:
    """Requests of two accounts, one with two keys; by key, the newest first."""
    home = fresh.home
    made = {
        name: run_command_json(
            *("keys", "create", "--name", name, "--account", account, "--create-account"), home=home
        )
        for name, account in (("ann 1", "ann"), ("ann 2", "ann"), ("bob", "bob"))
    }
    asked: dict[str, list[str]] = {name: [] for name in made}
    for _ in range(3):
        for name, key in made.items():
            for model in ("fast:1", "slow:1"):
                answer = ask(fresh, key["key"], model)
                asked[name].insert(0, answer.json()["request_id"])
    return {"keys": made, "asked": asked}


def listed(box: Box, secret: str, /, **query: Any) -> list[dict[str, Any]]:
    answer = box.http("GET", "/v1/receipts", key=secret, params=query)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


def test_a_key_lists_the_receipts_of_its_account(fresh: Box, receipts: dict[str, Any]) -> None:
    keys, asked = receipts["keys"], receipts["asked"]
    of_ann = sorted([*asked["ann 1"], *asked["ann 2"]], reverse=True)
    for name, expected in (("ann 1", of_ann), ("ann 2", of_ann), ("bob", asked["bob"])):
        mine = listed(fresh, keys[name]["key"])
        assert [one["request_id"] for one in mine] == expected
    for one in mine:
        alone = fresh.http(
            "GET", f"/v1/receipts/{one['request_id']}", key=keys["bob"]["key"]
        ).json()
        assert alone.pop("opening") and alone.pop("inclusion")
        assert {**alone, "key": keys["bob"]["id"], "key_name": "bob"} == one
    everybody = {one["request_id"] for one in listed(fresh, fresh.key, limit=1000)}
    assert everybody >= {*of_ann, *asked["bob"]}


def test_receipts_are_chosen_by_key_and_model(fresh: Box, receipts: dict[str, Any]) -> None:
    keys, asked = receipts["keys"], receipts["asked"]
    ann, bob = keys["ann 1"], keys["bob"]
    for key in (ann["key"], fresh.key):
        for name in ("ann 2", keys["ann 2"]["id"]):
            assert [one["request_id"] for one in listed(fresh, key, key=name)] == asked["ann 2"]
    slow = listed(fresh, ann["key"], model="slow:1")
    assert {one["model"] for one in slow} == {"slow:1"} and len(slow) == 6
    assert len(listed(fresh, ann["key"], model="slow:1", key="ann 1")) == 3
    assert listed(fresh, ann["key"], model="no:1") == []
    # Of another account there is nothing, by its key's id or its name.
    assert listed(fresh, ann["key"], key=bob["id"]) == []
    other = fresh.http("GET", "/v1/receipts", key=ann["key"], params={"key": "bob"})
    assert other.status_code == 404


@pytest.mark.parametrize("query", [{}, {"model": "fast:1"}, {"key": "ann 1"}])
def test_receipts_come_in_pages(
    fresh: Box, receipts: dict[str, Any], query: dict[str, str]
) -> None:
    key = receipts["keys"]["ann 1"]["key"]
    whole = [one["request_id"] for one in listed(fresh, key, **query)]
    found: list[str] = []
    while True:
        after = {"after": found[-1]} if found else {}
        page = fresh.http("GET", "/v1/receipts", key=key, params={**query, **after, "limit": 2})
        found += [one["request_id"] for one in page.json()["data"]]
        if not page.json()["has_more"]:
            break
    assert found == whole and len(set(found)) == len(whole) > 2


def test_a_list_of_receipts_needs_its_scope_and_known_parameters(fresh: Box) -> None:
    other = run_command_json("keys", "create", "--scope", "inference", home=fresh.home)["key"]
    assert fresh.http("GET", "/v1/receipts", key=other).status_code == 403
    for query in ({"modell": "x"}, {"limit": "0"}, {"limit": "1001"}):
        assert fresh.http("GET", "/v1/receipts", params=query).status_code == 422


# -- who it is -------------------------------------------------------------------------------------


def test_the_node_key_is_what_receipts_are_verified_with(fresh: Box, tmp_path: Path) -> None:
    printed = run_command("id", home=fresh.home).stdout.strip()
    told = run_command_json("id", home=fresh.home)
    assert re.fullmatch("[0-9a-f]{64}", printed)
    assert told == {"node_id": f"node_{printed}", "node_key": printed}
    file = tmp_path / "receipt.json"
    file.write_text(fresh.http("GET", f"/v1/receipts/{ask(fresh).json()['request_id']}").text)

    def verify(key: str) -> subprocess.CompletedProcess[str]:
        return run_command(
            "receipts", "verify", str(file), "--node-key", key, home=tmp_path / "no", check=False
        )

    for key in (printed, f"node_{printed}", printed.upper(), f" {printed}\n"):
        assert verify(key).returncode == 0
    assert verify("0" * 64).returncode == 1  # a key, and not this one
    for placeholder in ("NODE_KEY", "node_...", "", printed[:-1], f"{printed}0", "HEX", "sk-pnv-x"):
        done = verify(placeholder)
        assert done.returncode == 2 and "'pinaivu id'" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_home_without_a_box_has_no_node_key_and_gets_none(tmp_path: Path) -> None:
    done = run_command("id", home=tmp_path / "home", check=False)
    assert done.returncode == 1 and "pinaivu serve" in done.stderr
    assert not (tmp_path / "home").exists()


# -- commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (["key"], "Did you mean keys?"),
        (["serv"], "Did you mean serve or service?"),
        (["model"], ""),
        (["Doctor"], "Did you mean doctor?"),
        (["keys", "lst"], "Did you mean ls?"),
        (["peers", "jion"], "Did you mean join?"),
        (["ledger", "setle"], "Did you mean settle?"),
        (["receipts", "verfy"], "Did you mean verify?"),
        (["accounts", "remove"], ""),
        (["invite"], "peers invite"),
        (["create"], "keys create"),
    ],
)
def test_a_mistyped_command_names_the_nearest(command: list[str], hint: str) -> None:
    done = run_command(*command, home=None, check=False)
    assert done.returncode == 2
    assert f"No such command '{command[-1]}'." in done.stderr and hint in done.stderr
    assert hint or "The commands are: " in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("keys", "create", "--expires", "30"),
        ("keys", "create", "--budget", "10 per 30"),
        ("keys", "rotate", "key_1", "--overlap", "24"),
        ("peers", "invite", "--expires", "1.5"),
    ],
)
def test_a_time_needs_its_unit(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = run_command(*command, home=tmp_path / "home", check=False)
    number = command[-1].split()[-1]
    assert done.returncode == 2
    assert f"'{number}' has no unit" in done.stderr and f"{number}d" in done.stderr


def test_the_api_wants_units_too(fresh: Box) -> None:
    key = run_command_json("keys", "create", home=fresh.home)["id"]
    for path, body in (
        (f"/v1/admin/keys/{key}/rotate", {"overlap": "24"}),
        ("/v1/admin/keys", {"policy": {"budget": {"amount": "1", "period": "30"}}}),
    ):
        answer = fresh.http("POST", path, json=body)
        assert answer.status_code == 422 and "has no unit" in answer.json()["error"]["message"]


def test_a_budget_without_a_price_warns(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()

    def warned(*options: str) -> bool:
        return "warning: " in run_command("keys", "create", *options, home=home).stderr

    budget = ("--budget", "10")
    assert warned(*budget) and not warned()
    assert not warned(*budget, "--price", "*=1") and warned(*budget, "--price", "*=0")
    (home / "config.toml").write_text('[pricing.models]\n"a:1" = "2"\n')
    assert not warned(*budget) and not warned(*budget, "--model", "a:*")
    assert warned(*budget, "--model", "b:*")
    (home / "config.toml").write_text('[pricing]\nper_1k_tokens = "1"\nmodels = { "a:1" = "0" }\n')
    assert not warned(*budget) and warned(*budget, "--model", "a:1")
    key = run_command_json("keys", "create", "--model", "a:1", home=home)["id"]
    assert "warning: " in run_command("keys", "edit", key, *budget, home=home).stderr
    done = run_command("keys", "create", *budget, "--model", "a:1", "--json", home=home)
    assert json.loads(done.stdout)["key"] and "warning: " in done.stderr


def test_the_api_warns_of_it_too(fresh: Box) -> None:
    policy = {"budget": {"amount": "1"}, "prices": {"*": "0"}}
    made = fresh.http("POST", "/v1/admin/keys", json={"policy": policy}).json()
    assert "no model" in made["warning"]
    path, priced = f"/v1/admin/keys/{made['id']}", {"policy": {"prices": {"*": "1"}}}
    assert "warning" not in fresh.http("PATCH", path, json=priced).json()
    again = fresh.http("PATCH", path, json={"policy": {"prices": {"*": "0"}}}).json()
    assert again["warning"] == made["warning"]


# -- the end ---------------------------------------------------------------------------------------


def test_ctrl_c_says_goodbye_on_a_terminal(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    serving = subprocess.Popen(
        [*PINAIVU, "serve", "--home", str(tmp_path / "home"), "--port", "0"],
        stdout=theirs, stderr=theirs, env=environment(),
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
        while data := os.read(ours, 4096):
            shown += data
            if b"print(answer" in data:
                serving.send_signal(signal.SIGINT)
    assert serving.wait(60) == 0
    assert b"Stopping." in shown and shown.rstrip().endswith(b"Goodbye.")


def test_goodbye_into_a_pipe_that_is_closed_hurts_nobody(tmp_path: Path) -> None:
    home = tmp_path / "home"
    serving = subprocess.Popen(
        [*PINAIVU, "serve", "--home", str(home), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert serving.stdout is not None
    while b"print(answer" not in serving.stdout.readline():
        pass
    serving.stdout.close()
    serving.send_signal(signal.SIGINT)
    _, errors = serving.communicate(timeout=60)
    assert serving.returncode == 0 and b"Traceback" not in errors and b"Broken" not in errors


def test_a_measurement_shows_how_it_goes_on(fresh: Box) -> None:
    url = fresh.url
    key = ("--key", fresh.key, "--model", "fast:1", "--requests", "4", "--output-tokens", "4")
    done = subprocess.run(
        [*PINAIVU, "bench", url, *key],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert "requests" not in done.stderr  # where nobody looks on
    status, shown = on_terminal("bench", url, *key, home=None)
    assert status == 0 and "asking the server" in shown and "4 requests" in shown
