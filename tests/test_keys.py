"""API keys: made, listed and revoked by the command line, with a server on the home or without."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.box import Box, pinaivu, pinaivu_json, wait_until

SECRET = re.compile(r"sk-pnv-[0-9A-Za-z]{40,}")
FAKE = ("--model", "fake:1=fake:0")


def works(box: Box, key: str) -> bool:
    status = box.http("GET", "/v1/models", key=key).status_code
    assert status in (200, 401)
    return status == 200


def ask_fake(box: Box, key: str) -> Any:
    return box.client_with(key).chat.completions.create(
        model="fake:1", messages=[{"role": "user", "content": "hi"}], max_tokens=5
    )


def states(home: Path) -> dict[str, str]:
    return {key["id"]: key["state"] for key in pinaivu_json("keys", "ls", home=home)}


# -- create --------------------------------------------------------------------------------------


def test_create_prints_the_documented_json(tmp_path: Path) -> None:
    made = pinaivu_json("keys", "create", "--name", "laptop", home=tmp_path / "home")
    assert {"id", "key", "name", "prefix", "expires_at"} <= set(made)
    assert SECRET.fullmatch(made["key"])
    assert made["key"].startswith(made["prefix"])
    assert len("sk-pnv-") < len(made["prefix"]) < 16
    assert made["name"] == "laptop"
    assert made["expires_at"] is None
    assert pinaivu_json("keys", "create", home=tmp_path / "home")["key"] != made["key"]


def test_create_without_json_prints_the_key_alone(tmp_path: Path) -> None:
    """So that `KEY=$(pinaivu keys create)` works; what is to be said is on stderr."""
    done = pinaivu("keys", "create", home=tmp_path / "home")
    assert SECRET.fullmatch(done.stdout.strip())
    assert done.stdout.strip() not in done.stderr


def test_expires_is_from_now(tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    made = pinaivu_json("keys", "create", "--expires", "30d", home=tmp_path / "home")
    after = datetime.now(UTC)
    expiry = datetime.fromisoformat(made["expires_at"])
    assert before + timedelta(days=30) <= expiry <= after + timedelta(days=30)


@pytest.mark.parametrize("duration", ["0", "-1d", "soon", "", "5 weeks", "1e3s", "99999999999d"])
def test_an_expiry_that_is_none_is_a_wrong_call(tmp_path: Path, duration: str) -> None:
    home = tmp_path / "home"
    done = pinaivu("keys", "create", f"--expires={duration}", home=home, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "--expires" in done.stderr
    assert states(home) == {}


def test_a_key_made_before_the_first_start_is_the_first_key(tmp_path: Path) -> None:
    """The server then makes and prints none of its own."""
    home = tmp_path / "home"
    made = pinaivu_json("keys", "create", home=home)
    box = Box(home).start()
    try:
        assert not SECRET.search(box.output)
        assert works(box, made["key"])
        assert list(states(home)) == [made["id"]]
    finally:
        box.end()


def test_a_key_made_while_the_server_runs_works_at_once(new_box: Any) -> None:
    box = new_box()
    made = pinaivu_json("keys", "create", home=box.home)
    assert works(box, made["key"])
    assert works(box, box.key)


# -- ls ------------------------------------------------------------------------------------------


def test_ls_tells_what_each_key_has_done_but_no_secret(new_box: Any) -> None:
    box = new_box(*FAKE)
    made = pinaivu_json("keys", "create", "--name", "phone", home=box.home)
    usages = [ask_fake(box, made["key"]).usage.total_tokens for _ in range(3)]
    for listing in (
        pinaivu("keys", "ls", "--json", home=box.home),
        pinaivu("keys", "ls", home=box.home),
    ):
        assert not SECRET.search(listing.stdout + listing.stderr)
        assert made["id"] in listing.stdout
        assert "phone" in listing.stdout
    by_id = {key["id"]: key for key in pinaivu_json("keys", "ls", home=box.home)}
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
def test_a_revocation_holds_for_the_next_request(new_box: Any, name_it_by: str) -> None:
    box = new_box()
    made = pinaivu_json("keys", "create", home=box.home)
    other = pinaivu_json("keys", "create", home=box.home)
    assert works(box, made["key"])
    pinaivu("keys", "revoke", made[name_it_by], home=box.home)
    assert not works(box, made["key"])
    assert works(box, other["key"])
    assert states(box.home)[made["id"]] == "revoked"
    assert states(box.home)[other["id"]] == "active"


def test_a_revocation_without_a_server_holds_when_it_starts(tmp_path: Path) -> None:
    home = tmp_path / "home"
    good, bad = (pinaivu_json("keys", "create", home=home) for _ in range(2))
    pinaivu("keys", "revoke", bad["id"], home=home)
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
        pinaivu("keys", "create", home=home)
    done = pinaivu("keys", "revoke", name, home=home, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert set(states(home).values()) == {"active"}


def test_revoking_twice_keeps_the_first_time(tmp_path: Path) -> None:
    home = tmp_path / "home"
    made = pinaivu_json("keys", "create", home=home)
    pinaivu("keys", "revoke", made["id"], home=home)
    (once,) = pinaivu_json("keys", "ls", home=home)
    pinaivu("keys", "revoke", made["id"], home=home)
    assert pinaivu_json("keys", "ls", home=home) == [once]


# -- expiry --------------------------------------------------------------------------------------


def test_a_key_works_until_it_expires(new_box: Any) -> None:
    box = new_box()
    made = pinaivu_json("keys", "create", "--expires", "10s", home=box.home)
    assert works(box, made["key"])
    wait_until(lambda: not works(box, made["key"]), "the key to expire")
    assert states(box.home)[made["id"]] == "expired"


# -- what is on disk -----------------------------------------------------------------------------


def test_no_secret_is_on_disk_only_its_hash(new_box: Any) -> None:
    """Every byte of every file in the home, while the server runs and after it ended."""
    box = new_box(*FAKE, "--log-level", "debug")
    secret = pinaivu_json("keys", "create", "--name", "findable-name", home=box.home)["key"]
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
        pinaivu("keys", "create", home=home)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.iterdir()}
        for name in ("identity.key", "pinaivu.db", "pinaivu.db-wal", "run.json"):
            assert modes[name] == 0o600, name
        assert set(modes.values()) <= {0o600, 0o700}
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
    finally:
        os.umask(umask)
        box.end()
