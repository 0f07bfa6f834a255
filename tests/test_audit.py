"""The audit trail: every change leaves an entry, no entry tells a secret, nobody changes one."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import Box, StartBox

FAKE = ("--model", "fake:1=fake:0")
HASH = re.compile(r"argon2|sk-pnv-[0-9A-Za-z]{7}|[0-9a-f]{64}")


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    return module_box(*FAKE)


def entries(box: Box, **parameters: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = box.http("GET", "/v1/admin/audit", params=parameters).json()[
        "data"
    ]
    return found


def test_every_command_that_changes_something_is_told_of(tmp_path: Path) -> None:
    home = tmp_path / "home"

    def run(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return run_command(*args, home=home, **more)

    account = run("accounts", "create", "alice").stdout.strip()
    run("accounts", "passwd", "alice", "--password-stdin", input="a good password\n")
    key = run_command_json("keys", "create", "--account", "alice", "--rpm", "60", home=home)["id"]
    run("keys", "edit", key, "--rpm", "5", "--block", "unpaid", "--expires", "1d")
    run("keys", "edit", key, "--rpm", "5")  # changes nothing
    run("keys", "rotate", key, "--overlap", "1h")
    run("keys", "revoke", key)
    run("keys", "revoke", key)
    run("accounts", "rm", "alice")
    for reading in (("keys", "ls"), ("keys", "show", key), ("accounts", "ls"), ("audit",)):
        run(*reading)
    told = run_command_json("audit", home=home)
    assert [(one["action"], one["target"]) for one in told] == [
        ("account.create", account),
        ("account.passwd", account),
        ("key.create", key),
        ("key.edit", key),
        ("key.rotate", key),
        ("key.revoke", key),
        ("account.rm", account),
    ]
    assert {(one["actor"][:4], one["source"]) for one in told} == {("cli:", "local")}
    made, edit = told[2]["detail"], told[3]["detail"]
    assert made["account"] == "alice" and made["policy"]["rpm"] == 60
    assert edit["before"]["policy"]["rpm"] == 60 and edit["after"]["policy"]["rpm"] == 5
    assert (edit["before"]["blocked"], edit["after"]["blocked"]) == (None, "unpaid")
    assert datetime.fromisoformat(edit["after"]["expires_at"])
    assert datetime.fromisoformat(told[4]["detail"]["old_until"])
    assert not HASH.search(json.dumps(told))
    table = run("audit").stdout
    assert "key.rotate" in table and not HASH.search(table)


def test_every_call_that_changes_something_is_told_of_with_its_key_and_address(box: Box) -> None:
    whose = box.http("GET", "/v1/admin/keys").json()["data"][0]["id"]

    def ask(method: str, path: str, body: Any = None) -> dict[str, Any]:
        answer = box.http(method, f"/v1/admin/{path}", json=body)
        assert answer.status_code == 200, answer.text
        made: dict[str, Any] = answer.json()
        return made

    secret_word = "a good password"
    account = ask("POST", "accounts", {"name": "http", "password": secret_word})["id"]
    ask("PATCH", "accounts/http", {"role": "admin", "password": secret_word})
    made = ask("POST", "keys", {"account": "http", "policy": {"rpm": 3}})
    key = made["id"]
    ask("PATCH", f"keys/{key}", {"policy": {"rpm": None}, "name": "n"})
    rotated = ask("POST", f"keys/{key}/rotate", {})
    ask("POST", f"keys/{key}/revoke")
    ask("DELETE", "accounts/http")
    for path in ("accounts", "accounts/owner", "keys", f"keys/{key}", "audit"):
        ask("GET", path)
    told = [one for one in reversed(entries(box)) if one["target"] in (account, key)]
    assert [one["action"] for one in told] == [
        "account.create", "account.role", "account.passwd", "key.create", "key.edit",
        "key.rotate", "key.revoke", "account.rm",
    ]  # fmt: skip
    assert {(one["actor"], one["source"]) for one in told} == {(whose, "127.0.0.1")}
    text = json.dumps(told)
    assert not HASH.search(text)
    for secret in (secret_word, made["key"], rotated["key"], made["key"][-20:]):
        assert secret not in text


def test_a_refused_change_is_not_in_the_audit_trail(box: Box) -> None:
    before = entries(box)
    for method, path, body in [
        ("POST", "accounts", {"name": "owner"}),
        ("DELETE", "accounts/owner", None),
        ("PATCH", "accounts/owner", {"role": "member"}),
        ("POST", "keys", {"policy": {"max_queue": 3}}),
        ("POST", "keys", {"account": "nobody"}),
        ("POST", "keys/key_nothing/revoke", None),
    ]:
        assert box.http(method, f"/v1/admin/{path}", json=body).status_code >= 400
    assert entries(box) == before


def test_a_page_a_target_and_a_time(box: Box) -> None:
    made = [box.http("POST", "/v1/admin/keys", json={}).json()["id"] for _ in range(3)]
    whole = entries(box)
    assert [one["id"] for one in whole] == sorted((one["id"] for one in whole), reverse=True)
    page = box.http("GET", "/v1/admin/audit", params={"limit": 2}).json()
    assert page["data"] == whole[:2] and page["has_more"] is True
    assert page["request_id"].startswith("req_")
    assert entries(box, after=page["data"][-1]["id"]) == whole[2:]
    (only,) = entries(box, target=made[1])
    assert (only["action"], only["target"]) == ("key.create", made[1])
    assert entries(box, since=only["at"]) == [one for one in whole if one["at"] >= only["at"]]
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).date().isoformat()
    assert entries(box, since=tomorrow) == []
    assert run_command_json("audit", "--since", tomorrow, home=box.home) == []
    assert run_command_json("audit", "--target", made[1], home=box.home) == [only]
    assert run_command_json("audit", "--limit", "2", home=box.home) == list(reversed(whole[:2]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", "0"), ("limit", "1001"), ("limit", "x"), ("since", "yesterday"),
        ("after", "-1"), ("after", "99999999999999999999"), ("sinze", "2026-01-01"),
    ],
)  # fmt: skip
def test_a_parameter_that_is_none_is_422(box: Box, name: str, value: str) -> None:
    answer = box.http("GET", "/v1/admin/audit", params={name: value})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", name]


def test_a_wrong_call_of_the_command_is_exit_2(tmp_path: Path) -> None:
    for wrong in (("--since", "yesterday"), ("--limit", "0")):
        done = run_command("audit", *wrong, home=tmp_path / "home", check=False)
        assert done.returncode == 2 and wrong[0] in done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET actor = 'somebody else'",
        "UPDATE audit SET detail = '{}' WHERE id = 1",
        "DELETE FROM audit",
        "DELETE FROM audit WHERE id = 1",
        "REPLACE INTO audit SELECT id, at, 'x', source, action, target, '' FROM audit",
    ],
)
def test_the_database_refuses_to_change_the_trail(tmp_path: Path, statement: str) -> None:
    home = tmp_path / "home"
    run_command("keys", "create", home=home)
    before = run_command_json("audit", home=home)
    assert len(before) == 2
    database = sqlite3.connect(home / "pinaivu.db")
    with database, pytest.raises(sqlite3.DatabaseError, match="append-only"):
        database.execute(statement)
    database.close()
    assert run_command_json("audit", home=home) == before


def test_audit_entries_name_actors_and_targets(tmp_path: Path) -> None:
    home = tmp_path / "home"
    key = run_command_json("keys", "create", "--name", "ann's laptop", home=home)
    told = run_command_json("audit", home=home)
    named = {(one["action"], one["target_name"]) for one in told}
    assert named == {("account.create", "ann-s-laptop"), ("key.create", "ann's laptop")}
    assert {one["actor_name"] for one in told} == {None}
    for target in ("ann's laptop", key["id"]):
        (one,) = run_command_json("audit", "--target", target, home=home)
        assert one["target"] == key["id"]
    (one,) = run_command_json("audit", "--target", "ann-s-laptop", home=home)
    assert one["action"] == "account.create"
    assert run_command_json("audit", "--target", "nobody", home=home) == []
    table = run_command("audit", home=home).stdout
    assert "ann's laptop" in table and key["id"] not in table.replace("detail", "")
