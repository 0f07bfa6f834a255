"""The ledger as operators meet it: two running boxes, their commands and their API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.home import database_of, identity_of
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.ledger.entry import LedgerEntry
from tests.support.in_process_command import run_command, run_command_json
from tests.support.ledger_entries import entry
from tests.support.process_box import Box, wait_until

SETTINGS = '[peering]\nhost = "127.0.0.1"\nport = 0\nname = "{}"\n\n[peering.serve]\n'
LIMIT = 'credit_limit = "5"\n\n[pricing]\nper_1k_tokens = "0.5"\n'


def of(ours: Box, theirs: Box, name: str, **more: Any) -> LedgerEntry:
    return entry(identity_of(ours.home), identity_of(theirs.home), name, **more)


def write(box: Box, *entries: LedgerEntry) -> None:
    """What the box has served and was served."""

    us = identity_of(box.home).node_id

    async def run() -> None:
        async with database_of(box.home) as database:
            for one in entries:
                await ledger_entry.record(database, one, us)

    asyncio.run(run())


def settle(box: Box, peer: str) -> tuple[int, Any]:
    done = run_command("ledger", "settle", peer, "--json", home=box.home, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Box, Box]]:
    made = []
    for name in ("anna", "ben"):
        home = tmp_path / name
        home.mkdir()
        (home / "config.toml").write_text(SETTINGS.format(name) + LIMIT)
        made.append(Box(home, "--model", f"{name}:1=fake:0", "--peering").start())
    anna, ben = made
    ticket = run_command_json("peers", "invite", "--name", "ben", home=anna.home)["ticket"]
    run_command("peers", "join", ticket, home=ben.home)
    for box in made:
        wait_until(
            lambda box=box: any(
                one["state"] == "connected"
                for one in box.http("GET", "/v1/admin/peers").json()["data"]
            ),
            "a link",
        )
    yield anna, ben
    for box in made:
        box.end()


def test_two_operators_settle(pair: tuple[Box, Box]) -> None:
    anna, ben = pair
    write(anna, of(anna, ben, "req_1"), of(anna, ben, "req_2", served_by_us=False))
    write(anna, of(anna, ben, "req_3"))  # which ben has lost
    write(ben, of(ben, anna, "req_1", served_by_us=False), of(ben, anna, "req_2"))
    (owed,) = run_command_json("ledger", home=anna.home)
    assert (owed["name"], owed["served"], owed["received"]) == ("ben", "0.056", "0.028")
    assert (owed["balance"], owed["credit_limit"]) == ("0.028", "5")

    code, done = settle(anna, "ben")
    assert (code, done["differences"], done["given"]) == (0, [], 1)
    (made,) = done["statements"]
    assert (made["entries"], made["net"]) == (3, {"credits": "0.028"})
    for box, net in ((anna, "0.028"), (ben, "-0.028")):
        (kept,) = run_command_json("ledger", "statements", home=box.home)
        assert (kept["id"], kept["net"], kept["signed"]) == (
            made["id"],
            {"credits": net},
            made["signed"],
        )
        (owed,) = run_command_json("ledger", home=box.home)
        assert (owed["balance"], owed["carried"]) == (net, net)

    run_command("ledger", "paid", made["id"], home=anna.home)
    assert run_command_json("ledger", home=anna.home)[0]["balance"] == "0"
    # The other box keeps a note of its own.
    assert run_command_json("ledger", home=ben.home)[0]["balance"] == "-0.028"
    paid = ben.http("POST", f"/v1/admin/ledger/statements/{made['id']}/paid").json()
    (owes,) = ben.http("GET", "/v1/admin/ledger").json()["data"]
    assert paid["paid_at"] and owes["balance"] == "0"
    told = [one["action"] for one in run_command_json("audit", home=anna.home)]
    assert told[-2:] == ["ledger.settle", "ledger.paid"]
    code, again = settle(ben, "anna")
    assert (code, again["statements"], again["differences"]) == (0, [], [])


def test_all_legs_that_were_served_are_settled(pair: tuple[Box, Box]) -> None:
    """Requests of one and of three choices, served by the other box."""
    anna, ben = pair
    wait_until(lambda: "ben:1" in anna.http("GET", "/v1/models").text, "ben's model")
    tokens = 0
    for choices in (1, 3):
        asked = {"model": "ben:1", "n": choices, "max_tokens": 8}
        body = {**asked, "messages": [{"role": "user", "content": "hello"}]}
        answer = anna.http("POST", "/v1/chat/completions", json=body)
        tokens += answer.json()["usage"]["total_tokens"]
    wait_until(lambda: len(run_command_json("ledger", "show", "anna", home=ben.home)) == 4, "all")
    code, done = settle(ben, "anna")
    assert (code, done["taken"], done["given"]) == (0, 0, 0)
    (made,) = done["statements"]
    assert made["entries"] == 4 and float(made["net"]["credits"]) == tokens / 2000


def test_a_restart_forgets_nothing_of_what_a_peer_did(pair: tuple[Box, Box]) -> None:
    anna, _ = pair
    wait_until(lambda: "ben:1" in anna.http("GET", "/v1/models").text, "ben's model")
    body = {"model": "ben:1", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    for _ in range(3):
        assert anna.http("POST", "/v1/chat/completions", json=body).status_code == 200

    def why() -> str:
        shown: str = run_command_json("peers", "show", "ben", home=anna.home)["reputation"]["why"]
        return shown

    assert "3 served and 0 failed" in why()
    anna.stop()
    anna.start()
    assert "3 served and 0 failed" in why()
    assert "3 served" in run_command("peers", "ls", "--why", home=anna.home).stdout


def test_they_differ_and_are_told_where(pair: tuple[Box, Box]) -> None:
    anna, ben = pair
    write(anna, of(anna, ben, "req_1"), of(anna, ben, "req_2"))
    write(ben, of(ben, anna, "req_1", served_by_us=False))
    write(ben, of(ben, anna, "req_2", served_by_us=False, prompt_paid=False))
    for box, peer, values in (
        (anna, "ben", ("0.028 credits", "0.02 credits")),
        (ben, "anna", ("0.02 credits", "0.028 credits")),
    ):
        code, done = settle(box, peer)
        (told,) = done["differences"]
        assert code == 1 and done["statements"] == []
        assert (told["request_id"], told["ours"], told["theirs"]) == ("req_2", *values)
        shown = run_command_json("ledger", "show", peer, home=box.home)
        assert {one["request_id"] for one in shown} == {"req_1", "req_2"}
        assert {one["statement"] for one in shown} == {None}


def test_both_operators_settle_at_the_same_moment(pair: tuple[Box, Box]) -> None:
    anna, ben = pair
    write(anna, of(anna, ben, "req_1"), of(anna, ben, "req_2", served_by_us=False))

    def ask(box: Box, peer: str) -> Any:
        return box.http("POST", f"/v1/admin/ledger/{peer}/settle")

    with ThreadPoolExecutor() as both:
        done = list(both.map(ask, pair, ("ben", "anna")))
    assert [one.status_code for one in done] == [200, 200], done
    # One of the two may have come when all was done.
    (made,) = {one["id"] for answer in done for one in answer.json()["statements"]}
    assert all(
        run_command_json("ledger", "statements", home=box.home)[0]["id"] == made for box in pair
    )


def test_an_entry_that_a_peer_does_not_accept_is_listed_and_written_off(
    pair: tuple[Box, Box],
) -> None:
    anna, ben = pair
    write(anna, of(anna, ben, "req_1", accepted=False))
    (owed,) = run_command_json("ledger", home=anna.home)
    assert (owed["balance"], owed["waiting"]) == ("0", "0.028")
    code, done = settle(anna, "ben")
    assert (code, done["statements"], done["accepted"]) == (0, [], 0)
    (told,) = done["disputed"]
    assert told["request_id"] == "req_1" and "no receipt of that request" in told["why"]
    shown = run_command("ledger", "show", "ben", home=anna.home)
    assert "disputed" in shown.stdout and "no receipt" in shown.stderr
    assert "'ledger forgive'" in run_command("ledger", home=anna.home).stderr
    said = run_command("ledger", "forgive", "ben", home=anna.home).stdout
    assert said == "1 entries were written off: 0.028 credits.\n"
    assert run_command_json("ledger", home=anna.home)[0]["waiting"] == "0"
    assert "forgiven" in run_command("ledger", "show", "ben", home=anna.home).stdout
    (noted,) = [
        one for one in run_command_json("audit", home=anna.home) if "forgive" in one["action"]
    ]
    assert noted["detail"] == {"entries": 1, "amounts": {"credits": "0.028"}}
    again = anna.http("POST", "/v1/admin/ledger/ben/forgive").json()
    assert (again["entries"], again["amounts"]) == (0, {})


def test_settling_with_nobody_is_one_sentence(pair: tuple[Box, Box]) -> None:
    anna, ben = pair
    gone = run_command("ledger", "settle", "bne", home=anna.home, check=False)
    assert gone.returncode == 1 and "Did you mean ben?" in gone.stderr
    ben.kill()
    dead = run_command("ledger", "settle", "ben", home=anna.home, check=False)
    assert dead.returncode == 1 and dead.stderr.count("\n") == 1 and "Traceback" not in dead.stderr
    unknown = run_command("ledger", "paid", "stmt_1", home=anna.home, check=False)
    assert unknown.returncode == 1 and "no statement stmt_1" in unknown.stderr


def test_the_ledger_needs_an_admins_key_and_a_running_box(tmp_path: Path) -> None:
    box = Box(tmp_path / "home", "--model", "fake:1=fake:0").start()
    try:
        key = run_command_json("keys", "create", "--name", "a", home=box.home)["key"]
        assert box.http("GET", "/v1/admin/ledger", key=key).status_code == 403
        assert box.http("GET", "/v1/admin/ledger").json()["data"] == []
        peer = identity_of(tmp_path / "other").node_id
        write(box, of(box, Box(tmp_path / "other"), "req_1"))
        off = box.http("POST", f"/v1/admin/ledger/{peer}/settle")
        assert off.status_code == 409 and "--peering" in off.json()["error"]["message"]
    finally:
        box.end()
    assert run_command_json("ledger", home=box.home)[0]["balance"] == "0.028"
    stopped = run_command("ledger", "settle", peer, home=box.home, check=False)
    assert stopped.returncode == 1 and "pinaivu serve" in stopped.stderr
