"""API keys: made, listed and revoked by the command line, with a server on the home or without."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import stat
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.store.keys import LS, LS_OF_ACCOUNT
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import Box, StartBox, wait_until

SECRET = re.compile(r"sk-pnv-[0-9A-Za-z]{40,}")
FAKE = ("--model", "fake:1=fake:0")


@pytest.fixture(scope="module")
def keys_box(module_box: StartBox) -> Box:
    """A box to which tests add keys."""
    return module_box(*FAKE)


def works(box: Box, key: str) -> bool:
    status = box.http("GET", "/v1/models", key=key).status_code
    assert status in (200, 401)
    return status == 200


def ask_fake(box: Box, key: str) -> Any:
    return box.client_with(key).chat.completions.create(
        model="fake:1", messages=[{"role": "user", "content": "hi"}], max_tokens=5
    )


def states(home: Path) -> dict[str, str]:
    return {key["id"]: key["state"] for key in run_command_json("keys", "ls", home=home)}


# -- create --------------------------------------------------------------------------------------


def test_create_prints_the_documented_json(tmp_path: Path) -> None:
    made = run_command_json("keys", "create", "--name", "laptop", home=tmp_path / "home")
    assert {"id", "key", "name", "prefix", "expires_at"} <= set(made)
    assert SECRET.fullmatch(made["key"])
    assert made["key"].startswith(made["prefix"])
    assert len("sk-pnv-") < len(made["prefix"]) < 16
    assert made["name"] == "laptop"
    assert made["expires_at"] is None
    assert run_command_json("keys", "create", home=tmp_path / "home")["key"] != made["key"]


def test_create_without_json_prints_the_key_alone(tmp_path: Path) -> None:
    """So that `KEY=$(pinaivu keys create)` works; what is to be said is on stderr."""
    done = run_command("keys", "create", home=tmp_path / "home")
    assert SECRET.fullmatch(done.stdout.strip())
    assert done.stdout.strip() not in done.stderr


def test_expires_is_from_now(tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    made = run_command_json("keys", "create", "--expires", "30d", home=tmp_path / "home")
    after = datetime.now(UTC)
    expiry = datetime.fromisoformat(made["expires_at"])
    assert before + timedelta(days=30) <= expiry <= after + timedelta(days=30)


@pytest.mark.parametrize("duration", ["0", "-1d", "soon", "", "5 weeks", "1e3s", "99999999999d"])
def test_an_invalid_expiry_is_a_usage_error(tmp_path: Path, duration: str) -> None:
    home = tmp_path / "home"
    done = run_command("keys", "create", f"--expires={duration}", home=home, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "--expires" in done.stderr
    assert states(home) == {}


def test_a_key_made_before_the_first_start_is_the_first_key(tmp_path: Path) -> None:
    """The server then makes and prints none of its own."""
    home = tmp_path / "home"
    made = run_command_json("keys", "create", home=home)
    box = Box(home).start()
    try:
        assert not SECRET.search(box.output)
        assert works(box, made["key"])
        assert list(states(home)) == [made["id"]]
    finally:
        box.end()


def test_a_key_made_while_the_server_runs_works_at_once(keys_box: Box) -> None:
    made = run_command_json("keys", "create", home=keys_box.home)
    assert works(keys_box, made["key"])
    assert works(keys_box, keys_box.key)


# -- ls ------------------------------------------------------------------------------------------


def test_ls_tells_what_each_key_has_done_but_no_secret(new_box: Any) -> None:
    box = new_box(*FAKE)
    made = run_command_json("keys", "create", "--name", "phone", home=box.home)
    usages = [ask_fake(box, made["key"]).usage.total_tokens for _ in range(3)]
    for listing in (
        run_command("keys", "ls", "--json", home=box.home),
        run_command("keys", "ls", home=box.home),
    ):
        assert not SECRET.search(listing.stdout + listing.stderr)
        assert made["id"] in listing.stdout
        assert "phone" in listing.stdout
    by_id = {key["id"]: key for key in run_command_json("keys", "ls", home=box.home)}
    assert len(by_id) == 2
    phone = by_id[made["id"]]
    assert phone["prefix"] == made["prefix"]
    assert made["key"].endswith(phone["last_four"])
    assert (phone["requests"], phone["tokens"]) == (3, sum(usages))
    assert phone["state"] == "active"
    assert datetime.fromisoformat(phone["last_used_at"])
    assert phone["admin"] is False
    (first,) = [key for key in by_id.values() if key["id"] != made["id"]]
    assert (first["admin"], first["requests"], first["last_used_at"]) == (True, 0, None)


# -- revoke --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name_it_by", ["id", "prefix", "key"])
def test_a_revocation_holds_for_the_next_request(keys_box: Box, name_it_by: str) -> None:
    made = run_command_json("keys", "create", home=keys_box.home)
    other = run_command_json("keys", "create", home=keys_box.home)
    assert works(keys_box, made["key"])
    run_command("keys", "revoke", made[name_it_by], home=keys_box.home)
    assert not works(keys_box, made["key"])
    assert works(keys_box, other["key"])
    assert states(keys_box.home)[made["id"]] == "revoked"
    assert states(keys_box.home)[other["id"]] == "active"


def test_a_revocation_without_a_server_holds_when_it_starts(tmp_path: Path) -> None:
    home = tmp_path / "home"
    good, bad = (run_command_json("keys", "create", home=home) for _ in range(2))
    run_command("keys", "revoke", bad["id"], home=home)
    box = Box(home).start()
    try:
        assert works(box, good["key"])
        assert not works(box, bad["key"])
    finally:
        box.end()


@pytest.mark.parametrize("name", ["key_nothing", "sk-pnv-", "sk-pnv-zzzzzz", "", "%", "key_%"])
def test_a_name_that_fits_none_or_several_revokes_none(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    for _ in range(2):
        run_command("keys", "create", home=home)
    done = run_command("keys", "revoke", name, home=home, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert set(states(home).values()) == {"active"}


def test_revoking_twice_keeps_the_first_time(tmp_path: Path) -> None:
    home = tmp_path / "home"
    made = run_command_json("keys", "create", home=home)
    run_command("keys", "revoke", made["id"], home=home)
    (once,) = run_command_json("keys", "ls", home=home)
    run_command("keys", "revoke", made["id"], home=home)
    assert run_command_json("keys", "ls", home=home) == [once]


# -- expiry --------------------------------------------------------------------------------------


def test_a_key_works_until_it_expires(keys_box: Box) -> None:
    made = run_command_json("keys", "create", "--expires", "1h", home=keys_box.home)
    assert works(keys_box, made["key"])
    with sqlite3.connect(keys_box.home / "pinaivu.db") as database:
        soon = time.time_ns() // 1_000_000 + 1000
        database.execute("UPDATE keys SET expires_at = ? WHERE id = ?", (soon, made["id"]))
    wait_until(lambda: not works(keys_box, made["key"]), "the key to expire")
    assert states(keys_box.home)[made["id"]] == "expired"


# -- what is on disk -----------------------------------------------------------------------------


def test_no_secret_is_on_disk_only_its_hash(new_box: Any) -> None:
    """Every byte of every file in the home, while the server runs and after it ended."""
    box = new_box(*FAKE, "--log-level", "debug")
    secret = run_command_json("keys", "create", "--name", "findable-name", home=box.home)["key"]
    ask_fake(box, secret)

    def on_disk() -> bytes:
        files = [path for path in box.home.rglob("*") if path.is_file()]
        assert len(files) >= 3
        return b"\0".join(path.read_bytes() for path in files)

    while_running = on_disk()
    assert box.stop() == 0
    for found in (while_running, on_disk()):
        assert b"findable-name" in found  # what is looked for would be found
        assert hashlib.sha256(secret.encode()).digest() in found
        for key in (secret, box.key):
            assert key.encode() not in found
            assert key.removeprefix("sk-pnv-")[6:].encode() not in found


def test_the_home_is_for_its_owner_alone(tmp_path: Path) -> None:
    """Whatever the umask, and also where the directory was there before."""
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    box = Box(home, *FAKE)
    umask = os.umask(0)
    try:
        box.start()
        ask_fake(box, box.key)
        run_command("keys", "create", home=home)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.iterdir()}
        for name in ("identity.key", "pinaivu.db", "pinaivu.db-wal", "run.json"):
            assert modes[name] == 0o600, name
        assert set(modes.values()) <= {0o600, 0o700}
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
    finally:
        os.umask(umask)
        box.end()


# -- settings, lists, rotation ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        ("--rpm", "0"), ("--rpm", "x"), ("--tpm", "-1"), ("--max-parallel", "1.5"),
        ("--max-queue", "3"), ("--budget", "ten"), ("--budget", "1 per week"), ("--weight", "0"),
        ("--weight", "nan"), ("--scope", "king"), ("--network", "10.0.0.1/8"),
        ("--policy", "dearest"),
        ("--price", "0.1"), ("--price", "x=1/2/3/4"), ("--price", "x=-1"), ("--model", ""),
        ("--admin", "--scope", "usage"), ("--name", "two\nlines"),
    ],
)  # fmt: skip
def test_an_invalid_setting_is_a_usage_error(tmp_path: Path, wrong: tuple[str, ...]) -> None:
    home = tmp_path / "home"
    done = run_command("keys", "create", *wrong, home=home, check=False)
    assert done.returncode == 2
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert states(home) == {}
    assert (
        run_command_json("accounts", "ls", home=home)[0]["name"] == "owner"
    )  # none was made for it


def test_edit_changes_what_is_given_and_none_clears_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    made = run_command_json(
        "keys", "create", "--rpm", "60", "--model", "a:*", "--model", "b:*", "--budget", "5",
        "--expires", "1d", "--price", "a:*=0.5", "--scope", "usage", "--policy", "balance",
        home=home,
    )  # fmt: skip

    def edit(*options: str) -> Any:
        return run_command_json("keys", "edit", made["id"], *options, home=home)

    edited = edit("--tpm", "100", "--model", "c:*", "--name", "new", "--lenient")
    policy = {**made["policy"], "tpm": 100, "models": ["c:*"], "lenient": True}
    assert edited["policy"] == policy
    assert (edited["name"], edited["expires_at"]) == ("new", made["expires_at"])
    cleared = edit(
        "--rpm", "none", "--tpm", "none", "--model", "none", "--budget", "none", "--price", "none",
        "--scope", "none", "--expires", "none", "--no-lenient", "--policy", "none",
    )  # fmt: skip
    plain = run_command_json("keys", "create", home=home)
    assert cleared["policy"] == plain["policy"] and cleared["expires_at"] is None
    assert cleared == run_command_json("keys", "show", made["prefix"], home=home)
    for wrong in (("--block", " "), ("--block", "x", "--unblock"), ("--now",), ("--rpm", "0")):
        done = run_command("keys", "edit", made["id"], *wrong, home=home, check=False)
        assert done.returncode == 2
    assert edit() == cleared


def test_rotate_prints_a_new_secret_alone_and_only_of_a_key_that_works(tmp_path: Path) -> None:
    home = tmp_path / "home"
    made = run_command_json("keys", "create", home=home)
    done = run_command("keys", "rotate", made["id"], home=home)
    assert SECRET.fullmatch(done.stdout.strip()) and done.stdout.strip() != made["key"]
    assert done.stdout.strip() not in done.stderr
    assert "until" in done.stderr
    for wrong in ("-1h", "soon", "99999999999d"):
        done = run_command(
            "keys", "rotate", made["id"], f"--overlap={wrong}", home=home, check=False
        )
        assert done.returncode == 2 and "--overlap" in done.stderr
    run_command("keys", "revoke", made["id"], "--now", home=home)
    done = run_command("keys", "rotate", made["id"], home=home, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_revoke_now_without_a_server_says_that_there_was_nothing_to_stop(tmp_path: Path) -> None:
    home = tmp_path / "home"
    made = run_command_json("keys", "create", home=home)
    done = run_command("keys", "revoke", made["id"], "--now", home=home)
    assert done.returncode == 0
    assert "No box is running" in done.stderr
    assert states(home)[made["id"]] == "revoked"


def test_ls_shows_the_newest_100_of_many_and_their_limits(tmp_path: Path) -> None:
    home = tmp_path / "home"
    run_command("keys", "create", "--name", "old", home=home)
    with sqlite3.connect(home / "pinaivu.db") as database:
        database.execute(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000)"
            " INSERT INTO keys (id, account_id, hash, prefix, last_four, name, policy, created_at)"
            " SELECT printf('key_0%08d', i), 'acct_owner', randomblob(32), 'sk-pnv-' || i, 'abcd',"
            "        'many ' || i, '{}', i FROM n"
        )
    database.close()
    limits = ("--rpm", "60", "--max-parallel", "2", "--budget", "10 per 30d")
    newest = run_command_json("keys", "create", "--name", "newest", *limits, home=home)
    listed = run_command_json("keys", "ls", home=home)
    assert len(listed) == 100
    assert [one["name"] for one in listed[-3:]] == ["many 2000", "old", "newest"]
    table = run_command("keys", "ls", home=home)
    (row,) = [line for line in table.stdout.splitlines() if newest["id"] in line]
    assert "60 rpm, 2 parallel, 0 of 10 per 30d" in row
    assert "--all" in table.stderr
    whole = run_command_json("keys", "ls", "--all", home=home)
    assert len(whole) == 2_002
    (only,) = run_command_json("keys", "ls", "--account", "newest", home=home)
    assert only["id"] == newest["id"]
    assert run_command("keys", "ls", "--account", "nobody", home=home, check=False).returncode == 1


def test_lists_of_keys_are_found_by_an_index(tmp_path: Path) -> None:
    home = tmp_path / "home"
    run_command("keys", "create", home=home)
    with sqlite3.connect(home / "pinaivu.db") as database:
        for statement, values in ((LS, ("l", 100)), (LS_OF_ACCOUNT, ("acct_owner", "l", 100))):
            plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {statement}", values)]
            assert any(step.startswith("SEARCH keys USING INDEX") for step in plan), plan
            assert not any(step.startswith("SCAN") for step in plan), plan
            assert not any("ORDER BY" in step for step in plan), plan  # nothing is sorted
    database.close()


def test_a_name_is_printed_as_it_is(tmp_path: Path) -> None:
    """Not as markup of whatever draws the table."""
    home = tmp_path / "home"
    run_command("keys", "create", "--name", "[/red] [bold]x[/]", home=home)
    assert "[/red] [bold]x[/]" in run_command("keys", "ls", home=home).stdout


@pytest.mark.parametrize(
    "policy",
    [
        '{"scopes": ["inference", "fly"]}',
        '{"rps": 3}',
        '{"networks": ["everywhere"]}',
        '{"budget": {"amount": "1", "period": "1 month"}}',
        '{"prices": {"*": "free"}}',
        "no JSON",
        "",
    ],
)
def test_settings_that_cannot_be_read_block_their_key_alone(keys_box: Box, policy: str) -> None:
    """A newer version may have written them, and they may be a limit."""
    box = keys_box
    before = states(box.home)
    made = run_command_json("keys", "create", home=box.home)
    with sqlite3.connect(box.home / "pinaivu.db") as database:
        database.execute("UPDATE keys SET policy = ? WHERE id = ?", (policy, made["id"]))
    refused = box.http("GET", "/v1/models", key=made["key"])
    assert refused.status_code == 403 and "newer version" in refused.json()["detail"]
    assert states(box.home) == {**before, made["id"]: "blocked"}
    edited = run_command("keys", "edit", made["id"], "--rpm", "3", home=box.home, check=False)
    assert edited.returncode == 1 and "newer version" in edited.stderr
    assert box.http("GET", "/v1/models").status_code == 200


def test_the_audit_trail_names_who_ran_the_command_not_who_they_say_they_are(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    run_command("keys", "create", home=home, env={"USER": "mallory", "LOGNAME": "mallory"})
    actors = {entry["actor"] for entry in run_command_json("audit", home=home)}
    assert len(actors) == 1 and actors != {"cli:mallory"}
