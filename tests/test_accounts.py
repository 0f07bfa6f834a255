"""Accounts: who owns keys, what their roles allow, and how passwords are kept."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.errors import RowConflict
from pinaivu_box.store import accounts
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.database import Database
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import Box, StartBox

FAKE = ("--model", "fake:1=fake:0")
ARGON2ID = re.compile(r"\$argon2id\$v=19\$m=65536,t=2,p=1\$[A-Za-z0-9+/]{22}\$[A-Za-z0-9+/]{43}")
PASSWORD = "correct horse battery"
BY = Actor("test", "local")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    return module_box(*FAKE)


def names(home: Path) -> dict[str, Any]:
    return {one["name"]: one for one in run_command_json("accounts", "ls", home=home)}


def ask(box: Box, key: str) -> str:
    """The id of a request made with that key."""
    answer = box.client_with(key).chat.completions.create(
        model="fake:1", messages=[{"role": "user", "content": "hi"}], max_tokens=3
    )
    return str(answer.request_id)


def status(box: Box, path: str, key: str) -> int:
    return box.http("GET", path, key=key).status_code


# -- the commands ----------------------------------------------------------------------------------


def test_create_ls_passwd_rm(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert set(names(home)) == {"owner"}
    made = run_command_json("accounts", "create", "alice", "--role", "admin", home=home)
    assert (made["name"], made["role"], made["has_password"]) == ("alice", "admin", False)
    bob = run_command("accounts", "create", "bob", home=home).stdout.strip()
    assert names(home)["bob"]["id"] == bob
    assert names(home)["bob"]["role"] == "member"
    run_command("accounts", "passwd", "bob", "--password-stdin", home=home, input=PASSWORD + "\n")
    assert names(home)["bob"]["has_password"] is True
    table = run_command("accounts", "ls", home=home).stdout
    assert "alice" in table and bob in table
    run_command("accounts", "rm", bob, home=home)
    assert set(names(home)) == {"alice", "owner"}
    # The name is free again, for somebody else.
    assert run_command("accounts", "create", "bob", home=home).stdout.strip() != bob


@pytest.mark.parametrize(
    ("command", "code", "word"),
    [
        (("create", "owner"), 1, "already"),
        (("create", "Bob Smith"), 2, "not a valid account name"),
        (("create", "acct_owner"), 2, "not a valid account name"),
        (("create", "carol", "--role", "king"), 2, "king"),
        (("create", "carol", "--password-stdin"), 2, "8 characters"),
        (("create", "carol", "--password"), 2, "--password-stdin"),
        (("passwd", "owner", "--password-stdin"), 2, "8 characters"),
        (("passwd", "nobody", "--password-stdin"), 1, "nobody"),
        (("rm", "nobody"), 1, "nobody"),
        (("rm", "owner"), 1, "no admin"),
        (("rm", "acct_owner"), 1, "no admin"),
    ],
)
def test_an_invalid_change_of_an_account_fails_with_one_sentence(
    tmp_path: Path, command: tuple[str, ...], code: int, word: str
) -> None:
    home = tmp_path / "home"
    before = names(home)
    done = run_command("accounts", *command, home=home, check=False, input="short\n")
    assert done.returncode == code
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert names(home) == before
    assert run_command_json("audit", home=home) == []


def test_a_long_list_ends_at_100(tmp_path: Path) -> None:
    home = tmp_path / "home"
    names(home)
    with sqlite3.connect(home / "pinaivu.db") as database:
        database.executemany(
            "INSERT INTO accounts (id, name, role, created_at) VALUES (?, ?, 'member', 0)",
            [(f"acct_{n:04}", f"n{n:04}") for n in range(150)],
        )
    assert list(names(home)) == [f"n{n:04}" for n in range(100)]
    assert "--all" in run_command("accounts", "ls", home=home).stderr
    assert len(run_command_json("accounts", "ls", "--all", home=home)) == 151


# -- whose keys ------------------------------------------------------------------------------------


def test_a_key_without_an_account_gets_one_of_its_own(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for name in ("laptop", "laptop", "Zoë's phone!", "", "acct_owner"):
        run_command("keys", "create", "--name", name, home=home)
    whose = [key["account"] for key in run_command_json("keys", "ls", home=home)]
    assert len(set(whose)) == 5 and "owner" not in whose
    assert whose[0] == "laptop" and whose[1].startswith("laptop-")
    assert all(names(home)[name]["role"] == "member" for name in whose)
    assert all(names(home)[name]["keys"] == 1 for name in whose)
    admin = run_command_json("keys", "create", "--admin", home=home)
    assert admin["account"] == "owner"


def test_only_keys_of_an_admins_account_may_have_the_scope_admin(tmp_path: Path) -> None:
    home = tmp_path / "home"
    run_command("accounts", "create", "bob", home=home)
    run_command("accounts", "create", "alice", "--role", "admin", home=home)
    for admin in (("--admin",), ("--scope", "admin")):
        done = run_command("keys", "create", "--account", "bob", *admin, home=home, check=False)
        assert done.returncode == 2
        assert "bob is a member" in done.stderr
        made = run_command_json("keys", "create", "--account", "alice", *admin, home=home)
        assert made["admin"] is True
    plain = run_command_json("keys", "create", "--account", "bob", home=home)
    done = run_command("keys", "edit", plain["id"], "--scope", "admin", home=home, check=False)
    assert done.returncode == 2
    assert run_command_json("keys", "show", plain["id"], home=home)["admin"] is False


def test_keys_share_their_accounts_receipts_and_nobody_elses(box: Box) -> None:
    run_command("accounts", "create", "family", home=box.home)
    mine, ours = (
        run_command_json("keys", "create", "--account", "family", home=box.home)["key"]
        for _ in range(2)
    )
    others = run_command_json("keys", "create", home=box.home)["key"]
    request_id = ask(box, mine)
    receipt = f"/v1/receipts/{request_id}"
    assert status(box, receipt, mine) == status(box, receipt, ours) == 200
    assert status(box, receipt, others) == 404
    assert box.http("GET", "/v1/usage", key=ours).json()["total_requests"] == 1
    assert box.http("GET", "/v1/usage", key=others).json()["total_requests"] == 0


def test_removing_an_account_revokes_its_keys_and_keeps_its_books(box: Box) -> None:
    run_command("accounts", "create", "leaver", home=box.home)
    made = [
        run_command_json("keys", "create", "--account", "leaver", home=box.home) for _ in range(2)
    ]
    other = run_command_json("keys", "create", home=box.home)["key"]
    request_id = ask(box, made[0]["key"])
    done = run_command("accounts", "rm", "leaver", home=box.home)
    assert "2 keys" in done.stderr
    for key in made:
        refused = box.http("GET", "/v1/models", key=key["key"])
        assert refused.status_code == 401
        assert "revoked" in refused.json()["error"]["message"]
        assert run_command_json("keys", "show", key["id"], home=box.home)["state"] == "revoked"
    assert status(box, "/v1/models", other) == 200
    assert status(box, f"/v1/receipts/{request_id}", box.key) == 200
    done = run_command("keys", "create", "--account", "leaver", home=box.home, check=False)
    assert done.returncode == 1


# -- passwords -------------------------------------------------------------------------------------


def test_a_password_is_kept_as_argon2id_and_nowhere_else(tmp_path: Path) -> None:
    home = tmp_path / "home"
    run_command("accounts", "create", "alice", "--password-stdin", home=home, input=PASSWORD + "\n")
    with sqlite3.connect(home / "pinaivu.db") as database:
        kept = database.execute("SELECT password FROM accounts WHERE name = 'alice'").fetchone()[0]
    assert ARGON2ID.fullmatch(kept)
    on_disk = b"".join(path.read_bytes() for path in home.iterdir() if path.is_file())
    assert b"alice" in on_disk and PASSWORD.encode() not in on_disk
    said = str(run_command_json("audit", home=home)) + str(names(home))
    assert PASSWORD not in said and "argon2" not in said


@pytest.mark.anyio
async def test_a_password_is_right_or_not(tmp_path: Path) -> None:
    async with Database(tmp_path / "box.db") as database:
        alice = await accounts.create(database, "alice", "member", PASSWORD, BY)
        await accounts.create(database, "nopass", "member", None, BY)

        async def fits(name: str, password: str) -> bool:
            found = await accounts.check_password(database, name, password)
            assert found is None or found.name == name
            return found is not None

        assert await fits("alice", PASSWORD)
        for name, password in (
            ("alice", PASSWORD + " "), ("alice", ""), ("nopass", ""), ("nobody", ""),
            ("nobody", PASSWORD), ("owner", PASSWORD),
        ):  # fmt: skip
            assert not await fits(name, password)
        await accounts.set_password(database, alice, "another password", BY)
        assert not await fits("alice", PASSWORD)
        assert await fits("alice", "another password")
        await accounts.set_password(database, alice, None, BY)
        assert not await fits("alice", "another password")
        await accounts.set_password(database, alice, PASSWORD, BY)
        await accounts.remove(database, alice, BY)
        assert not await fits("alice", PASSWORD)


@pytest.mark.anyio
async def test_a_key_is_not_made_for_an_account_that_has_just_gone(tmp_path: Path) -> None:
    from pinaivu_box.policy import Policy
    from pinaivu_box.store import keys
    from pinaivu_box.store.new_keys import Draft, NewKeys

    async with Database(tmp_path / "box.db") as database:
        alice = await accounts.create(database, "alice", "member", None, BY)
        batch = NewKeys(database, BY)
        await batch.add(Draft("", "alice", Policy()))
        await accounts.remove(database, alice, BY)
        with pytest.raises(RowConflict):
            await batch.write()
        assert await keys.ls(database) == []
        with pytest.raises(RowConflict):
            await accounts.remove(database, await accounts.find(database, "owner"), BY)
