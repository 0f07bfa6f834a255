"""Writes home/ and receipts_v2.json: a box of three that ffd1110's code has run, and what its
commands print of it.  Also openapi.json."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pinaivu_box.home import database_of, identity_of
from pinaivu_box.server.openapi import specification
from pinaivu_box.store import claims, ledger
from tests.box import Box, pinaivu, pinaivu_json, wait_until
from tests.peering.books import entry

HERE = Path(__file__).parent
HOME = HERE / "home"
BOXES: list[Any] = []
SETTINGS = (
    '[peering]\nenabled = true\nhost = "127.0.0.1"\nport = 0\nname = "{}"\n\n'
    '[peering.serve]\ncredit_limit = "5"\n\n[pricing]\nper_1k_tokens = "{}"\n'
)
MESSAGES = [
    {"role": "system", "content": "Answer briefly. Grüße!"},
    {"role": "user", "content": "Say hello."},
]
CHAT, COMPLETE, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (
        CHAT,
        {
            "model": "anna:1",
            "messages": MESSAGES,
            "max_tokens": 8,
            "seed": 5,
            "logprobs": True,
            "top_logprobs": 2,
            "stop": ["zebra"],
        },
    ),
    "choices": (
        CHAT,
        {
            "model": "anna:1",
            "messages": MESSAGES,
            "max_tokens": 6,
            "n": 2,
            "seed": 9007199254740993,
            "min_tokens": 2,
        },
    ),
    "completions": (
        COMPLETE,
        {
            "model": "anna:1",
            "prompt": ["Once upon", "Zwölf"],
            "max_tokens": 4,
            "seed": 3,
            "logprobs": 1,
        },
    ),
    "embeddings": (EMBED, {"model": "anna:1", "input": ["a cat", "the sea"], "dimensions": 8}),
    "peer": (
        CHAT,
        {"model": "ben:1", "messages": MESSAGES, "max_tokens": 6, "seed": 5, "logprobs": True},
    ),
    "peer, choices": (CHAT, {"model": "ben:1", "messages": MESSAGES, "max_tokens": 5, "n": 2}),
    "peer, embeddings": (EMBED, {"model": "ben:1", "input": ["a cat"], "dimensions": 8}),
}
COMMANDS = (
    "id",
    "accounts ls",
    "keys ls",
    "keys show app",
    "keys show limited",
    "keys show blocked",
    "usage",
    "usage --by day --by model",
    "usage --by hour --by key",
    "usage --by account",
    "usage --by node",
    "usage --by peer --model ben:1",
    "usage --account alice",
    "usage --key app",
    "ledger",
    "ledger show ben",
    "ledger show dora",
    "ledger statements",
    "ledger statements --peer ben",
    "audit",
    "audit --target app",
    "audit --target ben --limit 2",
)


def run(work: Any) -> Any:
    return asyncio.run(work)


async def write(home: Path, *entries: Any) -> None:
    async with database_of(home) as database:
        for one in entries:
            await ledger.record(database, one)


async def dispute(home: Path, one: Any) -> None:
    async with database_of(home) as database:
        await claims.dispute(database, {one: "there is no receipt of that request here"})


def key(home: Path, *options: str) -> str:
    return str(pinaivu_json("keys", "create", *options, home=home)["key"])


def main() -> None:
    (HERE / "openapi.json").write_text(
        json.dumps(specification(), indent=1, ensure_ascii=False) + "\n"
    )
    folder = Path(tempfile.mkdtemp())
    boxes = {}
    for name, price in (("anna", "0.5"), ("ben", "0.25"), ("carl", "1")):
        home = folder / name
        home.mkdir()
        (home / "config.toml").write_text(SETTINGS.format(name, price))
        boxes[name] = Box(home, "--model", f"{name}:1=fake:0").start()
        BOXES.append(boxes[name])
    anna, ben, carl = boxes.values()
    for other in (ben, carl):
        ticket = pinaivu_json("peers", "invite", "--name", other.home.name, home=anna.home)[
            "ticket"
        ]
        pinaivu("peers", "join", ticket, home=other.home)
    wait_until(
        lambda: (
            [one["state"] for one in anna.http("GET", "/v1/admin/peers").json()["data"]]
            == ["connected"] * 2
        ),
        "links",
    )
    wait_until(lambda: "ben:1" in anna.http("GET", "/v1/models").text, "ben's model")

    # Accounts and keys
    for name, role in (("alice", "member"), ("carla", "admin"), ("gone", "member")):
        done = pinaivu(
            "accounts",
            "create",
            name,
            "--role",
            role,
            "--password-stdin",
            home=anna.home,
            input=f"secret of {name}\n",
        )
        assert done.stdout.startswith("acct_")
    app = key(anna.home, "--name", "app", "--account", "alice", "--rpm", "600", "--tpm", "100000")
    limited = key(
        anna.home,
        "--name",
        "limited",
        "--account",
        "alice",
        "--model",
        "anna*",
        "--network",
        "127.0.0.0/8",
        "--peer",
        "ben",
        "--policy",
        "prefer-local",
        "--max-parallel",
        "3",
        "--max-queue",
        "2",
        "--budget",
        "10",
        "--weight",
        "2.5",
        "--strict",
        "--price",
        "anna*=1/0.5/2",
        "--scope",
        "inference",
        "--scope",
        "usage",
        "--scope",
        "receipts",
        "--expires",
        "36500d",
    )
    local = key(
        anna.home,
        "--name",
        "local",
        "--scope",
        "local-only",
        "--scope",
        "inference",
        "--budget",
        "5 per 3660d",
    )
    key(anna.home, "--name", "spare", "--admin", "--account", "carla")
    key(anna.home, "--name", "of gone", "--account", "gone")
    key(anna.home, "--name", "short", "--expires", "1s")
    key(anna.home, "--name", "blocked", "--account", "alice")
    pinaivu("keys", "edit", "blocked", "--block", "unpaid", "--rpm", "1", home=anna.home)
    key(anna.home, "--name", "revoked", "--account", "alice")
    pinaivu("keys", "revoke", "revoked", home=anna.home)
    pinaivu("keys", "rotate", "limited", "--overlap", "36500d", home=anna.home)
    pinaivu("accounts", "rm", "gone", home=anna.home)

    # Requests, and what is refused
    receipts = {}
    for name, (path, body) in ASKED.items():
        answer = anna.http("POST", path, key=app, json=body)
        assert answer.status_code == 200, answer.text
        document = anna.http("GET", f"/v1/receipts/{answer.json()['request_id']}", key=app)
        receipts[name] = {
            "path": path,
            "request": body,
            "answer": answer.json(),
            "receipt": document.json(),
        }
    for secret in (limited, local):
        body = {"model": "anna:1", "messages": MESSAGES, "max_tokens": 5}
        assert anna.http("POST", CHAT, key=secret, json=body).status_code == 200
    assert anna.http("POST", CHAT, key=limited, json={**body, "model": "ben:1"}).is_error
    assert anna.http("POST", CHAT, key=app, json={**body, "model": "no:1"}).is_error
    assert anna.http("POST", CHAT, key="sk-pnv-wrong", json=body).status_code == 401
    responses = []
    previous = None
    for text, more in (("One.", {}), ("Two.", {}), ("Three.", {"background": True})):
        sent = {"model": "anna:1", "input": text, "max_output_tokens": 16, **more}
        if previous:
            sent["previous_response_id"] = previous
        made = anna.http("POST", "/v1/responses", key=app, json=sent)
        assert made.status_code == 200, made.text
        previous = made.json()["id"]
        wait_until(
            lambda: (
                anna.http("GET", f"/v1/responses/{previous}", key=app).json()["status"]
                not in ("queued", "in_progress")
            ),
            "response",
        )
        responses.append(anna.http("GET", f"/v1/responses/{previous}", key=app).json())

    # Served for others
    wait_until(lambda: "anna:1" in ben.http("GET", "/v1/models").text, "anna's model")
    for n in (1, 2):
        asked = {"model": "anna:1", "messages": MESSAGES, "max_tokens": 6, "n": n}
        assert ben.http("POST", CHAT, json=asked).status_code == 200
    wait_until(lambda: len(pinaivu_json("ledger", "show", "ben", home=anna.home)) == 7, "entries")
    time.sleep(1)
    done = pinaivu_json("ledger", "settle", "ben", home=anna.home)
    assert done["statements"] and not done["differences"], done
    pinaivu("ledger", "paid", done["statements"][0]["id"], home=anna.home)
    assert (
        anna.http(
            "POST", CHAT, key=app, json={"model": "ben:1", "messages": MESSAGES, "max_tokens": 7}
        ).status_code
        == 200
    )
    wait_until(lambda: len(pinaivu_json("ledger", "show", "ben", home=anna.home)) == 8, "entry")
    time.sleep(1)
    done = pinaivu_json("ledger", "settle", "ben", home=anna.home)
    assert done["statements"] and not done["differences"], done
    assert (
        anna.http(
            "POST", CHAT, key=app, json={"model": "ben:1", "messages": MESSAGES, "max_tokens": 3}
        ).status_code
        == 200
    )
    wait_until(lambda: len(pinaivu_json("ledger", "show", "ben", home=anna.home)) == 9, "entry")

    # Peers: limits, a name, a ticket that waits, and one who was put out
    pinaivu(
        "peers",
        "edit",
        "ben",
        "--max-parallel",
        "4",
        "--credit-limit",
        "7",
        "--hours",
        "18:00-08:00",
        "--model",
        "anna*",
        home=anna.home,
    )
    pinaivu("peers", "edit", "carl", "--name", "dora", home=anna.home)
    a, c = identity_of(anna.home), identity_of(carl.home)
    waits = [entry(a, c, f"req_{n}", accepted=False, at=1_764_400_000_000 + n) for n in (1, 2)]
    run(write(anna.home, *waits, entry(a, c, "req_3", at=1_764_400_000_003)))
    pinaivu("ledger", "forgive", "dora", home=anna.home)
    more = [entry(a, c, f"req_{n}", accepted=False, at=1_764_400_000_000 + n) for n in (4, 5)]
    run(write(anna.home, *more))
    run(dispute(anna.home, more[0]))
    pinaivu_json("peers", "invite", "--expires", "36500d", "--uses", "3", home=anna.home)
    pinaivu("peers", "rm", "dora", "--reason", "stolen", home=anna.home)
    time.sleep(2)
    shown = anna.http("GET", "/v1/admin/peers").json()
    for box in boxes.values():
        assert box.stop() == 0

    HOME.mkdir(exist_ok=True)
    found = sqlite3.connect(anna.home / "pinaivu.db")
    pragmas = [
        f"PRAGMA {name} = {found.execute(f'PRAGMA {name}').fetchone()[0]};"
        for name in ("application_id", "user_version")
    ]
    dump = "\n".join([*pragmas, *found.iterdump()]) + "\n"
    found.close()
    (HOME / "pinaivu.sql").write_text(dump)
    (HOME / "identity.key").write_text((anna.home / "identity.key").read_text())
    (HOME / "config.toml").write_text((anna.home / "config.toml").read_text())
    ids = [one["answer"]["request_id"] for one in receipts.values()]
    commands = [
        *COMMANDS,
        *(f"receipts {what} {ids[n]}" for what in ("show", "verify") for n in (0, 1, 4)),
    ]
    printed = {
        line: json.loads(pinaivu(*line.split(), "--json", home=anna.home).stdout)
        for line in commands
    }
    (HERE / "printed.json").write_text(json.dumps(printed, indent=1, ensure_ascii=False) + "\n")
    (HERE / "served.json").write_text(
        json.dumps(
            {"secrets": {"app": app, "limited": limited}, "responses": responses, "peers": shown},
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )
    (HERE / "receipts_v2.json").write_text(
        json.dumps(receipts, indent=1, ensure_ascii=False) + "\n"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        for box in BOXES:
            box.end()
