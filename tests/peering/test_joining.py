"""Boxes that join into a network: real servers with homes of their own, commands, links."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.support.in_process_command import run_command
from tests.support.peer_box import MakePeerBox, joined_boxes
from tests.support.process_box import PINAIVU, Box, environment, wait_until


def test_two_running_boxes_join_by_a_ticket(member: MakePeerBox) -> None:
    anna, ben = member("anna").start(), member("ben").start()
    made = anna.peers("invite", "--name", "kitchen", "--expires", "2h")
    assert made["ticket"].startswith("pnv1") and (made["name"], made["uses"]) == ("kitchen", 1)
    inviter = ben.peers("join", made["ticket"])
    assert inviter["name"] == "anna"
    wait_until(lambda: anna.sees("kitchen") and ben.sees("anna"), "both are connected")
    # What it offers comes with its advert, which may take a moment longer.
    wait_until(lambda: anna.listed()["kitchen"]["models"], "it says what it offers")
    (kitchen,) = anna.peers("ls")
    assert kitchen["state"] == "connected" and kitchen["link"]["direct"] is True
    assert [model["id"] for model in kitchen["models"] if model["id"] == "fake:1"]
    assert kitchen["software"] and abs(kitchen["clock_ahead"]) < 60
    assert kitchen["id"] == ben.admin("GET").json()["own"]["id"]
    for name in ("kitchen", kitchen["id"]):
        assert anna.peers("show", name)["id"] == kitchen["id"]
    table = anna.command("peers", "ls", "--why").stdout
    assert "kitchen" in table and "connected" in table and "fake:1" in table
    assert "reputation: " in table
    told = anna.command_json("audit")
    assert "peer.invite" in [entry["action"] for entry in told]
    assert made["ticket"] not in json.dumps(told)
    assert "peer.join" in [entry["action"] for entry in ben.command_json("audit")]


def test_a_box_that_does_not_run_joins_at_once(member: MakePeerBox) -> None:
    anna, ben = member("anna").start(), member("ben")
    ben.peers("join", anna.invite("--name", "ben"))
    wait_until(lambda: "ben" in anna.listed(), "anna knows it before it has ever served")
    ben.start()
    wait_until(lambda: anna.sees("ben") and ben.sees("anna"), "both are connected")
    # And again, after both have been away.
    assert (anna.stop(), ben.stop()) == (0, 0)
    anna.start()
    ben.start()
    wait_until(lambda: anna.sees("ben") and ben.sees("anna"), "both are connected again")


def test_a_box_that_does_not_run_invites(member: MakePeerBox) -> None:
    anna, ben = member("anna", "enabled = true\n"), member("ben").start()
    ticket = anna.invite("--name", "ben")
    code, said = ben.refused("join", ticket)
    assert code == 1 and ("did not answer" in said or "cannot be reached" in said)
    anna.start()
    ben.peers("join", ticket)
    wait_until(lambda: anna.sees("ben") and ben.sees("anna"), "both are connected")


def test_a_box_joins_all_by_joining_one_and_is_cut_off_by_all_when_removed(
    member: MakePeerBox,
) -> None:
    anna, ben, carl = joined_boxes(member, "anna", "ben", "carl")
    assert carl.refused("rm", "ben")[0] == 1  # it neither is an admin nor has invited it
    anna.peers("rm", "carl", "--reason", "sold")
    for box in (anna, ben):
        wait_until(lambda b=box: b.sees("carl", "revoked"), f"{box.name} has cut it off")
        assert "sold" in box.listed()["carl"]["why"]
        assert box.listed()["carl"]["link"] is None
    wait_until(lambda: carl.alone(), "it has no link any more")
    code, said = carl.refused("join", ben.invite())
    assert code == 1 and "revoked" in said
    assert ben.sees("carl", "revoked") and anna.sees("carl", "revoked")
    assert ben.sees("anna") and anna.sees("ben")
    # The founder alone may let it in again.
    carl.peers("join", anna.invite("--name", "carl"))
    wait_until(lambda: anna.sees("carl") and ben.sees("carl"), "it is let in again")


def test_removing_a_box_names_the_boxes_that_only_it_had_invited(member: MakePeerBox) -> None:
    anna, ben = joined_boxes(member, "anna", "ben")
    carl = member("carl").start()
    carl.peers("join", ben.invite("--name", "carl"))
    wait_until(lambda: anna.sees("carl"), "the third box is a member")
    removed = anna.command("peers", "rm", "ben")
    assert "no longer members either: carl (node_" in removed.stderr
    wait_until(lambda: anna.sees("carl", "revoked"), "it fell with the box that had invited it")
    carl.peers("join", anna.invite("--name", "carl"))
    wait_until(lambda: anna.sees("carl"), "it is admitted again")
    removed = anna.command("peers", "rm", "carl")
    assert "no longer members" not in removed.stderr


def test_a_box_that_was_away_learns_that_another_was_removed(member: MakePeerBox) -> None:
    anna, ben, carl = joined_boxes(member, "anna", "ben", "carl")
    ben.stop()
    carl.stop()
    anna.peers("rm", "carl")
    carl.start()
    ben.start()
    wait_until(lambda: ben.sees("carl", "revoked"), "ben has heard of it")
    wait_until(
        lambda: carl.alone() and ben.sees("anna") and ben.listed()["carl"]["link"] is None,
        "nobody lets it in",
    )


def test_a_ticket_is_for_so_many_boxes_and_for_so_long(member: MakePeerBox) -> None:
    anna, ben, carl = (member(name).start() for name in ("anna", "ben", "carl"))
    once = anna.invite()
    ben.peers("join", once)
    code, said = carl.refused("join", once)
    assert code == 1 and "used already" in said
    short = anna.invite("--expires", "10ms")
    time.sleep(1.1)  # tickets count whole seconds
    code, said = carl.refused("join", short)
    assert code == 1 and "expired" in said
    twice = anna.invite("--uses", "2")
    carl.peers("join", twice)
    cut = twice[:-3]
    assert carl.refused("join", cut)[0] == 2
    answer = carl.admin("POST", "", {"ticket": cut})
    assert answer.status_code == 422 and answer.json()["detail"][0]["loc"] == ["body", "ticket"]
    assert anna.admin("POST", "", {"ticket": twice}).status_code == 409  # it is its own


def test_without_peering_it_is_said_how_to_switch_it_on(tmp_path: Path) -> None:
    box = Box(tmp_path / "home", "--model", "fake:1=fake:0").start()
    try:
        for arguments in (("ls",), ("invite",)):
            done = run_command("peers", *arguments, home=box.home, check=False)
            assert done.returncode == 1 and "pinaivu serve --peering" in done.stderr
        answer = box.http("GET", "/v1/admin/peers")
        assert answer.status_code == 409 and "--peering" in answer.json()["error"]["message"]
        box.stop()
        done = run_command("peers", "invite", home=box.home, check=False)
        assert done.returncode == 1 and "pinaivu serve --peering" in done.stderr
        done = run_command("peers", "ls", home=box.home, check=False)
        assert done.returncode == 1 and "No box is running" in done.stderr
    finally:
        box.end()


def test_a_peers_name_and_limits_are_ones_own(member: MakePeerBox) -> None:
    anna, _ = joined_boxes(member, "anna", "ben")
    changed = anna.peers(
        "edit", "ben", "--name", "attic", "--max-parallel", "2", "--tokens-per-minute", "9000",
        "--credit-limit", "1.5", "--model", "fake:*", "--hours", "18:00-08:00",
    )  # fmt: skip
    limits = {
        "max_parallel": 2, "tokens_per_minute": 9000, "credit_limit": "1.5",
        "models": ["fake:*"], "hours": "18:00-08:00", "blocked": None,
    }  # fmt: skip
    assert changed["name"] == "attic" and changed["limits"] == limits
    assert anna.refused("show", "ben")[0] == 1
    assert anna.peers("edit", "attic", "--block", "too loud")["limits"]["blocked"] == "too loud"
    anna.stop()
    limits["blocked"] = None
    limits["hours"] = None
    assert anna.peers("edit", "attic", "--unblock", "--hours", "none")["limits"] == limits
    anna.start()
    wait_until(lambda: anna.sees("attic"), "it is connected under its new name")
    assert anna.peers("show", "attic")["limits"] == limits
    for wrong, loc in (
        ({"limits": {"hours": "late"}}, "hours"),
        ({"limits": {"credit_limit": "much"}}, "credit_limit"),
        ({"limits": {"max_parallel": -1}}, "max_parallel"),
        ({"limits": {"speed": 1}}, "speed"),
    ):
        answer = anna.admin("PATCH", "/attic", wrong)
        assert answer.status_code == 422 and loc in answer.text, answer.text
    assert anna.admin("GET", "/nobody").status_code == 404
    edits = [e for e in anna.command_json("audit") if e["action"] == "peer.edit"]
    assert len(edits) == 3 and edits[-1]["target"] == changed["id"]


def test_the_doctor_says_why_a_peer_cannot_be_reached(member: MakePeerBox) -> None:
    anna, ben = joined_boxes(member, "anna", "ben")
    wait_until(lambda: anna.listed()["ben"]["models"], "it says what it offers")
    checks = {one["name"]: one for one in anna.peers("doctor", "ben")}
    for what in ("membership", "link", "key", "version", "clock", "models", "limits"):
        assert checks[f"ben: {what}"]["state"] == "ok", checks
    assert checks["port"]["state"] == "ok", checks
    ben.kill()
    wait_until(lambda: anna.sees("ben", "unreachable"), "it is missed")
    done = anna.command("peers", "doctor", "--json", check=False)
    assert done.returncode == 1
    checks = {one["name"]: one for one in json.loads(done.stdout)}
    assert checks["ben: link"]["state"] == "failed" and checks["ben: link"]["todo"]
    assert "no program listens on that UDP port" in checks["ben: address"]["found"]
    anna.stop()
    done = anna.command("peers", "doctor", "--json", check=False)
    assert done.returncode == 1 and "No box is running" in done.stdout


def test_the_doctor_says_why_a_peer_is_not_served(member: MakePeerBox) -> None:
    """On both boxes: the one that does not serve, and the one that is not served."""
    anna, ben = member("anna").start(), member("ben", "", "--model", "ben:1=fake:0").start()
    ben.peers("join", anna.invite("--name", "ben"))
    wait_until(lambda: "ben:1" in anna.http("GET", "/v1/models").text, "ben's model")
    ben.peers("edit", "anna", "--hours", "00:00-00:00", "--credit-limit", "0")
    body = {"model": "ben:1", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    assert anna.http("POST", "/v1/chat/completions", json=body).status_code == 503
    told = [one for one in ben.peers("doctor", "anna") if one["name"] == "anna: limits"]
    assert [one["state"] for one in told] == ["warning"] * 2
    assert "00:00-00:00" in told[0]["found"] and "owes 0 of at most 0" in told[1]["found"]
    (refused,) = [one for one in anna.peers("doctor", "ben") if one["name"] == "ben: limits"]
    assert "This box serves its peers from 00:00-00:00 only" in refused["found"]
    assert "00:00-00:00" in anna.command("peers", "ls", "--why").stdout
    ben.peers("edit", "anna", "--hours", "none", "--credit-limit", "none")
    wait_until(
        lambda: anna.http("POST", "/v1/chat/completions", json=body).status_code == 200, "it serves"
    )
    for box, peer in ((anna, "ben"), (ben, "anna")):
        (well,) = [one for one in box.peers("doctor", peer) if one["name"] == f"{peer}: limits"]
        assert well["state"] == "ok"
    assert "0 of 8 requests" in ben.command("peers", "show", "anna").stdout


def test_a_key_says_who_may_serve_it(member: MakePeerBox) -> None:
    """Both boxes have the model, and the other is cheaper; one model only the other has."""
    anna = member("anna", '\n[pricing]\nper_1k_tokens = "1"\n').start()
    ben = member("ben", '\n[pricing]\nper_1k_tokens = "0.5"\n', "--model", "ben:1=fake:0").start()
    ben.peers("join", anna.invite("--name", "ben"))
    wait_until(lambda: "ben:1" in anna.http("GET", "/v1/models").text, "ben's models")
    ids = {box.admin("GET").json()["own"]["id"]: box.name for box in (anna, ben)}

    def key(*options: str) -> tuple[str, str]:
        made = anna.command_json("keys", "create", *options)
        return made["id"], made["key"]

    def ask(secret: str, model: str = "fake:1") -> tuple[int, str]:
        """The status, and who served it by which policy."""
        words = [{"role": "user", "content": "hello"}]
        body = {"model": model, "messages": words, "max_tokens": 4}
        answer = anna.http("POST", "/v1/chat/completions", key=secret, json=body)
        node, _, route = answer.headers.get("x-pinaivu-route", "").partition("; ")
        return answer.status_code, f"{ids.get(node)} {route.rpartition('policy=')[2]}"

    _, plain = key()
    assert ask(plain) == (200, "anna prefer-local")
    id_, cheap = key("--policy", "cheapest")
    assert ask(cheap) == (200, "ben cheapest")
    anna.command("keys", "edit", id_, "--policy", "none")
    assert ask(cheap) == (200, "anna prefer-local")
    body = {"policy": {"routing": "cheapest"}}
    assert anna.http("PATCH", f"/v1/admin/keys/{id_}", json=body).status_code == 200
    assert ask(cheap) == (200, "ben cheapest")
    body = {"policy": {"routing": "dearest"}}
    assert anna.http("PATCH", f"/v1/admin/keys/{id_}", json=body).status_code == 422
    wait_until(lambda: len(anna.command_json("ledger", "show", "ben")) == 2, "both")
    choices: list[tuple[str, str]] = [
        ("--policy", "never"),
        ("--scope", "local-only"),
        ("--peer", "carl"),
    ]
    for options in choices:
        _, private = key(*options)
        status, served = ask(private)
        assert (status, served.split()[0]) == (200, "anna")
        assert ask(private, "ben:1")[0] in (404, 503)
        listed = anna.http("GET", "/v1/models", key=private).text
        assert ("ben:1" in listed) is (options[0] == "--peer")
    assert len(anna.command_json("ledger", "show", "ben")) == 2


def test_a_box_that_announces_itself_is_discovered(member: MakePeerBox) -> None:
    anna = member("anna", "announce = true\n").start()
    ben = member("ben").start()

    def found() -> list[dict[str, Any]]:
        done = subprocess.run(
            [*PINAIVU, "peers", "discover", "--json"],
            capture_output=True, text=True, check=True, timeout=60, env=environment(),
        )  # fmt: skip
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    anna_id, ben_id = (box.admin("GET").json()["own"]["id"] for box in (anna, ben))
    near = wait_until(lambda: [one for one in found() if one["id"] == anna_id], "it is found")
    assert near[0]["name"] == "anna" and near[0]["addresses"]
    assert ben_id not in [one["id"] for one in found()]
