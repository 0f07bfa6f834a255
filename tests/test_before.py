"""What the code of commit ffd1110 wrote is read, and written, the same today.

`tests/before/` holds what that code made, before modules and classes were renamed: frames between
boxes with the values that they decode to, signed records, receipts, `/openapi.json`, and a home (as
SQL) with what the commands print of it.  Nothing there is ever made anew; the scripts that made it
are in the commit that added it.  In JSON, bytes are text that begins with "hex:", and a struct has
all its fields, under their names on the wire.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import click.testing
import httpx
import msgspec
import pytest
from msgspec import msgpack

from pinaivu_box import config
from pinaivu_box.box import Box
from pinaivu_box.box_services import open_box
from pinaivu_box.cli.main import cli
from pinaivu_box.files import wire as file_wire
from pinaivu_box.gossip import adverts as gossip_adverts
from pinaivu_box.gossip import frames as gossip_frames
from pinaivu_box.home import database_of
from pinaivu_box.ledger import reconcile
from pinaivu_box.ledger import session as ledger_session
from pinaivu_box.ledger import statement as ledger_statement
from pinaivu_box.ledger import wire as ledger_wire
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.membership import joining, tickets
from pinaivu_box.membership import records as membership_records
from pinaivu_box.membership.roster import Roster
from pinaivu_box.network import network
from pinaivu_box.receipts import receipt
from pinaivu_box.receipts.verify import Transcript, verify_receipt
from pinaivu_box.server.app import create_app
from pinaivu_box.store import keys
from pinaivu_box.store.database import Database
from pinaivu_box.text import NO_CONTROLS
from pinaivu_box.transport import wire

# Each kind of frame and how it is read.
DECODERS: dict[str, Callable[[bytes], Any]] = {
    "hello": wire.decode_hello,
    "open": wire.decode_open,
    "refusal": msgpack.Decoder(wire.Refusal).decode,
    "join": msgpack.Decoder(joining.JoinRequest).decode,
    "welcome": msgpack.Decoder(joining.Welcome).decode,
    "leg, to the serving box": leg_wire.to_serving.decode,
    "leg, to the coordinator": leg_wire.to_coordinator.decode,
    "gossip": gossip_frames.decode,
    "ledger": ledger_wire.decoder.decode,
    "model, question": file_wire.questions.decode,
    "model, answer": file_wire.answers.decode,
}
CONSTANTS = {
    "alpn": wire.NAME,
    "versions": list(wire.VERSIONS),
    "length of 5": wire.LENGTH.pack(5).hex(),
    "end frame": wire.END_FRAME.hex(),
    "beat": wire.BEAT.hex(),
    "max frame bytes": wire.MAX_FRAME_BYTES,
    "max hello bytes": wire.MAX_HELLO_BYTES,
    "max reason bytes": wire.MAX_REASON_BYTES,
    "max streams": wire.MAX_STREAMS,
    "codes": sorted(int(code) for code in wire.Code),
    "purposes": sorted(
        [
            leg_wire.PURPOSE,
            file_wire.PURPOSE,
            joining.PURPOSE,
            network.GOSSIP,
            ledger_session.PURPOSE,
        ]
    ),
    "domains": sorted(
        [
            receipt.PROOF_DOMAIN,
            receipt.ACCEPTANCE_DOMAIN,
            receipt.MARK_DOMAIN,
            receipt.RECEIPT_DOMAIN,
            ledger_statement.DOMAIN,
            membership_records.domain("member"),
            membership_records.domain("revocation"),
            membership_records.domain("advert"),
            membership_records.domain("gone"),
        ]
    ),
}

T = TypeVar("T")
BEFORE = Path(__file__).with_name("before")
NOW = 1_795_972_800  # 2026-11-29T17:20:00Z


def fixture(name: str) -> Any:
    return json.loads((BEFORE / name).read_text())


FRAMES, RECORDS, PRINTED = map(fixture, ("frames.json", "records.json", "printed.json"))
RECEIPTS, SERVED = map(fixture, ("receipts_v2.json", "served.json"))
OLD_RECEIPTS = fixture("../receipts_v1.json")
DERIVED = FRAMES["derived"]


# Fields that came since, with the value that old frames have.
ADDED: dict[tuple[type, str], Any] = {(leg_wire.Task, "system"): ""}


def plain(value: Any) -> Any:
    """A decoded value as JSON, with every field of every struct that there was then."""
    if isinstance(value, msgspec.Struct):
        shape = value.__struct_config__
        for (kind, name), default in ADDED.items():
            if isinstance(value, kind):
                assert getattr(value, name) == default
        values = [plain(getattr(value, name)) for name in value.__struct_fields__]
        tag = [] if shape.tag is None else [shape.tag]
        if shape.array_like:
            return tag + values
        named = dict(zip(value.__struct_encode_fields__, values, strict=True))
        named = {name: one for name, one in named.items() if (type(value), name) not in ADDED}
        return {shape.tag_field: shape.tag, **named} if tag else named
    if isinstance(value, bytes):
        return f"hex:{value.hex()}"
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {plain(key): plain(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [plain(element) for element in value]
    return value


@asynccontextmanager
async def in_process(home: Path) -> AsyncIterator[tuple[Box, httpx.AsyncClient]]:
    """A box on that home, and a client of its API."""
    file = home / "config.toml"

    def load() -> config.Config:
        return config.load(file if file.exists() else None, environ={})

    async with open_box(load, home) as box:
        transport = httpx.ASGITransport(create_app(box))
        async with httpx.AsyncClient(transport=transport, base_url="http://box") as client:
            yield box, client


def cases(kind_of_case: str) -> list[Any]:
    return [
        pytest.param(kind, case, id=f"{kind} {number}")
        for kind, recorded in FRAMES["frames"].items()
        for number, case in enumerate(recorded[kind_of_case])
    ]


# -- frames ----------------------------------------------------------------------------------------


def without_new_fields(values: Any, before: Any) -> Any:
    """The values without fields that were added since, which nobody sent then."""
    if isinstance(values, dict) and isinstance(before, dict):
        known = before.keys() & values.keys()
        return {name: without_new_fields(values[name], before[name]) for name in known}
    return values


@pytest.mark.parametrize(("kind", "case"), cases("exact"))
def test_a_frame_has_the_same_values_and_the_same_bytes(kind: str, case: dict[str, Any]) -> None:
    frame = bytes.fromhex(case["frame"])
    message = DECODERS[kind](frame)
    assert without_new_fields(plain(message), case["values"]) == case["values"]
    assert msgpack.encode(message) == frame


@pytest.mark.parametrize(("kind", "case"), cases("decoded"))
def test_a_frame_of_an_older_or_a_newer_box_has_the_same_values(
    kind: str, case: dict[str, Any]
) -> None:
    """Without the fields that may be left out, or with one that nobody knows yet."""
    values = plain(DECODERS[kind](bytes.fromhex(case["frame"])))
    assert without_new_fields(values, case["values"]) == case["values"]


def test_every_kind_of_frame_is_recorded() -> None:
    assert FRAMES["frames"].keys() == DECODERS.keys()
    assert all(recorded["exact"] for recorded in FRAMES["frames"].values())


@pytest.mark.parametrize("name", FRAMES["constants"])
def test_a_constant_of_the_wire_is_the_same(name: str) -> None:
    assert CONSTANTS[name] == FRAMES["constants"][name]


def test_a_long_message_of_a_leg_is_split_into_the_same_frames() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.frames: list[bytes] = []

        async def send(self, *frames: bytes) -> None:
            self.frames.extend(frames)

    split = FRAMES["split"]
    short = bytes.fromhex(FRAMES["frames"]["leg, to the serving box"]["exact"][1]["frame"])
    fields = msgpack.decode(short)
    fields["task"]["prompt"] = "x" * split["prompt"]
    message = DECODERS["leg, to the serving box"](msgpack.encode(fields))
    stop = DECODERS["leg, to the serving box"](msgpack.encode({"type": "stop"}))
    stream: Any = Recorder()
    asyncio.run(leg_wire.send(stream, message, stop))
    sent = [[len(frame), hashlib.sha256(frame).hexdigest()] for frame in stream.frames]
    assert sent == split["frames"]


# -- what is signed --------------------------------------------------------------------------------


def read_record(record: membership_records.Record) -> Any:
    module = membership_records if record.kind in ("member", "revocation") else gossip_adverts
    return module.read(record)


def sealed(case: dict[str, Any]) -> membership_records.Record:
    body, signature = bytes.fromhex(case["body"]), bytes.fromhex(case["signature"])
    return membership_records.Record(case["kind"], body, signature)


@pytest.mark.parametrize("case", RECORDS["records"], ids=lambda case: case["kind"])
def test_a_signed_record_is_verified_and_has_the_same_values(case: dict[str, Any]) -> None:
    record = sealed(case)
    content = read_record(record)
    values, body = plain(content), msgpack.encode(content)
    if case["kind"] == "advert":  # which had no `cpu_variant`: an array with one item less
        assert values.pop() == ""
        assert body[-1:] == msgpack.encode("")
        body = bytes([body[0] - 1]) + body[1:-1]
    assert values == case["values"]
    assert body == record.body
    with pytest.raises(membership_records.Invalid):
        read_record(membership_records.Record(record.kind, record.body, record.signature[::-1]))


def test_a_ticket_has_the_same_values_and_the_same_text() -> None:
    ticket = tickets.decode(RECORDS["ticket"]["text"])
    assert plain(ticket) == RECORDS["ticket"]["values"]
    assert tickets.encode(ticket) == RECORDS["ticket"]["text"]
    assert tickets.secret_hash(bytes(range(16))) == DERIVED["secret hash"]


def test_records_have_the_same_ids_and_rosters_the_same_digests() -> None:
    records = [sealed(case) for case in RECORDS["records"]]
    members = [record for record in records if record.kind in DERIVED["record ids"]]
    ids = [membership_records.record_id(record).hex() for record in members]
    assert ids == [one for of_kind in DERIVED["record ids"].values() for one in of_kind]
    adverts = [record for record in records if record not in members]
    assert [
        gossip_adverts.record_id(one, gossip_adverts.read(one)).hex() for one in adverts
    ] == DERIVED["advert ids"]
    roster = Roster(DERIVED["network"])
    assert not roster.admit(members).forged
    assert sorted(roster.members()) == DERIVED["members"]
    assert roster.digest().hex() == DERIVED["roster digest"]
    assert b"".join(roster.buckets()).hex() == DERIVED["roster buckets"]


def test_ledgers_have_the_same_keys_hashes_and_statements() -> None:
    entries = [
        reconcile.EntrySummary(
            server, request_id, leg, choice, currency, amount, bytes.fromhex(digest[4:])
        )
        for server, request_id, leg, choice, currency, amount, digest in DERIVED["items"]
    ]
    assert [entry.key.hex() for entry in entries] == DERIVED["places"]
    tree = reconcile.EntryTree(entries)
    assert tree.hash().hex() == DERIVED["hash of three"]
    assert plain(tree.range(b"")) == DERIVED["part of three"]
    node = entries[0].server
    many = reconcile.EntryTree(
        reconcile.EntrySummary(
            node, f"req_{n}", 0, 0, "credits", n, hashlib.sha256(b"%d" % n).digest()
        )
        for n in range(300)
    )
    assert plain(many.range(b"")) == DERIVED["part of 300"]
    assert plain(many.range(bytes([7]))) == DERIVED["part of 300 below"]
    text = DERIVED["statement"].encode()
    statement = ledger_statement.read(text)
    assert plain(statement) == json.loads(text)
    assert receipt.canonical(statement) == text
    assert ledger_statement.statement_id(text) == DERIVED["statement id"]
    last = ledger_statement.StoredStatement("", node, 1, 0, b"before", b"", b"")
    again = ledger_statement.compose(
        tree, statement.between[::-1], last, statement.upto, statement.at
    )
    assert receipt.canonical(again) == text
    assert receipt.mark_text("req_1", 2, 3, 40, "ab" * 32).decode() == DERIVED["mark"]


@pytest.mark.parametrize("name", RECEIPTS)
def test_a_receipt_of_version_2_is_verified(name: str) -> None:
    """With its answer: text, log-probabilities and vectors.  (`test_commitments` has version 1.)"""
    kept = RECEIPTS[name]
    document, answer = (msgspec.json.encode(kept[part]) for part in ("receipt", "answer"))
    checks = verify_receipt(document, transcript=Transcript(answer=answer))
    assert checks and [check.name for check in checks if not check.ok] == []
    other = next(one for one in RECEIPTS if one != name)
    foreign = msgspec.json.encode(RECEIPTS[other]["answer"])
    checks = verify_receipt(document, transcript=Transcript(answer=foreign))
    assert not all(check.ok for check in checks)


@pytest.mark.parametrize("kept", [*RECEIPTS.values(), *OLD_RECEIPTS.values()])
def test_a_receipt_and_its_proofs_are_encoded_to_the_signed_bytes(kept: dict[str, Any]) -> None:
    text = kept["receipt"]["signed_receipt"]
    content = msgspec.json.decode(text, type=receipt.Receipt)
    assert receipt.canonical(content).decode() == text
    assert content.proofs
    for proof in content.proofs:
        read = msgspec.json.decode(proof.signed, type=receipt.Proof)
        assert receipt.canonical(read).decode() == proof.signed


# -- the API ---------------------------------------------------------------------------------------

_WORDS = {"summary", "description"}
_SETS = {"required", "enum", "tags", "anyOf", "oneOf"}


def unworded(document: Any, within: str = "") -> Any:
    """A part of an OpenAPI document without its sentences, and in one order."""
    if isinstance(document, dict):
        names = within in ("properties", "schemas", "responses", "paths")
        return {
            key: unworded(content, "" if names else key)
            for key, content in document.items()
            if names or key not in _WORDS or not isinstance(content, str)
        }
    if isinstance(document, list):
        parts = [unworded(element) for element in document]
        if within in _SETS:
            return sorted(parts, key=json.dumps)
        return sorted(parts, key=lambda one: one["name"]) if within == "parameters" else parts
    return document


def _pull_by_name(schema: Any) -> Any:
    """The model may be a URL, and without a peer's name its own name says where it is."""
    model = {"minLength": 1, "maxLength": 2000, "pattern": NO_CONTROLS, "type": "string"}
    properties = {**schema["properties"], "model": model}
    properties["from"] = {**properties["from"], "default": ""}
    return {**schema, "properties": properties}


CHANGED_SINCE: dict[str, Callable[[Any], Any]] = {"Pull": _pull_by_name}


def without_additions(today: Any, before: Any) -> Any:
    """What `today` has of what `before` has: later versions add operations, fields, values of an
    enumeration and alternatives."""
    if isinstance(today, dict) and isinstance(before, dict):
        if before in today.get("anyOf", []):
            return before
        keys = before.keys() & today.keys()
        return {key: without_additions(today[key], before[key]) for key in keys}
    if isinstance(today, list) and isinstance(before, list):
        kept = [without_additions(now, then) for now in today for then in before]
        return [then for then in before if then in kept]
    return today


def test_openapi_json_keeps_all_that_it_had(tmp_path: Path) -> None:
    async def ask() -> Any:
        async with in_process(tmp_path / "home") as (_, client):
            return (await client.get("/openapi.json")).json()

    before, today = map(unworded, (fixture("openapi.json"), asyncio.run(ask())))
    schemas = before["components"]["schemas"]
    for name, change in CHANGED_SINCE.items():
        schemas[name] = unworded(change(schemas[name]))
    kept = without_additions(today, before)
    for path, operations in before["paths"].items():
        for method, operation in operations.items():
            assert kept["paths"][path].get(method) == operation, f"{method} {path}"
    for name, schema in schemas.items():
        assert kept["components"]["schemas"].get(name) == schema, name
    for document in (before, kept):
        del document["paths"], document["components"]["schemas"]
    assert kept == before


# -- the home --------------------------------------------------------------------------------------


def dump(path: Path) -> list[str]:
    """The whole file as SQL, its version first."""
    database = sqlite3.connect(path)
    try:
        pragmas = [
            f"PRAGMA {name} = {database.execute(f'PRAGMA {name}').fetchone()[0]};"
            for name in ("application_id", "user_version")
        ]
        return [*pragmas, *database.iterdump()]
    finally:
        database.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The home as ffd1110 left it."""
    home = tmp_path / "home"
    shutil.copytree(BEFORE / "home", home, ignore=shutil.ignore_patterns("*.sql"))
    database = sqlite3.connect(home / "pinaivu.db")
    database.executescript((BEFORE / "home" / "pinaivu.sql").read_text())
    database.close()
    return home


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an hour after the home was left."""
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.setattr(time, "time_ns", lambda: NOW * 1_000_000_000)


def in_database(home: Path, work: Callable[[Database], Awaitable[T]]) -> T:
    async def run() -> T:
        async with database_of(home) as database:
            return await work(database)

    return asyncio.run(run())


async def nothing(_: Database) -> None:
    pass


def test_a_home_keeps_its_rows(home: Path) -> None:
    before = dump(home / "pinaivu.db")
    assert "\n".join(before) + "\n" == (BEFORE / "home" / "pinaivu.sql").read_text()
    in_database(home, nothing)
    after = dump(home / "pinaivu.db")
    for line in before[2:]:  # the versions come first
        if line.startswith("INSERT INTO"):  # a column that has come since is null
            end = line.removesuffix(");")
            assert any(one.startswith((line, f"{end},NULL")) for one in after), line


def test_times_of_the_last_week_are_summed_up_by_the_hour(home: Path) -> None:
    """Which a home of version 5 has not."""
    hour = int(time.time()) // 3600 * 3_600_000
    with sqlite3.connect(home / "pinaivu.db") as database:
        number = database.execute(
            "UPDATE requests SET created_at = ?, ttft_ms = 120, total_ms = 1000", (hour + 7,)
        ).rowcount
    database.close()
    in_database(home, nothing)
    with sqlite3.connect(home / "pinaivu.db") as database:
        rows = database.execute("SELECT * FROM latencies_by_hour ORDER BY ms").fetchall()
    database.close()
    assert number
    (first, whole) = rows
    assert (first[0], first[1], first[3]) == (hour, "ttft", number) and 120 <= first[2] <= 132
    assert (whole[0], whole[1], whole[3]) == (hour, "total", number) and 1000 <= whole[2] <= 1100


def statements(path: Path) -> dict[tuple[str, str], str | None]:
    """What a file's schema was made by, without comments, spaces and quotes of names."""
    database = sqlite3.connect(path)
    try:
        rows = database.execute("SELECT type, name, sql FROM sqlite_schema").fetchall()
    finally:
        database.close()
    return {(kind, name): sql and normal(sql) for kind, name, sql in rows}


def normal(sql: str) -> str:
    words = re.sub(r"--[^\n]*", " ", sql).replace('"', "")
    return re.sub(r"\s*([(),;])\s*", r"\1", " ".join(words.split()))


def test_a_new_home_has_the_same_schema(home: Path, tmp_path: Path) -> None:
    for one in (home, tmp_path / "new"):
        in_database(one, nothing)
    before, today = (statements(one / "pinaivu.db") for one in (home, tmp_path / "new"))
    assert today.keys() == before.keys()
    for name, sql in before.items():
        assert today[name] == sql, name
    of_before, new = (dump(one / "pinaivu.db") for one in (home, tmp_path / "new"))
    assert new[:2] == of_before[:2]  # the versions
    rows = [line for line in new if line.startswith("INSERT INTO")]
    owner = [line for line in rows if "'acct_owner','owner','admin',NULL" in line]
    assert len(owner) == 1
    bounds = [line for line in of_before if line.startswith('INSERT INTO "latency_bounds"')]
    assert sorted(rows) == sorted([*owner, *bounds])


@pytest.mark.parametrize("line", PRINTED)
def test_a_command_prints_the_same_json(home: Path, clock: None, line: str) -> None:
    arguments = [*line.split(), "--json", "--home", str(home)]
    result = click.testing.CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert result.exception is None, result.exception
    printed, before = json.loads(result.stdout), PRINTED[line]
    if line.startswith("receipts verify"):  # what a check means is a sentence
        printed, before = ([{**one, "meaning": ""} for one in of] for of in (printed, before))
        printed = [one for one in printed if one["name"] != "log"]  # there was none
    assert as_it_was(printed, before) == before


def as_it_was(now: Any, before: Any) -> Any:
    """Without the fields of objects that have come since."""
    if isinstance(now, dict) and isinstance(before, dict):
        return {
            name: as_it_was(value, before[name]) for name, value in now.items() if name in before
        }
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        return [as_it_was(*pair) for pair in zip(now, before, strict=True)]
    return now


def test_the_keys_of_a_home_work(home: Path, clock: None) -> None:
    async def found(database: Database) -> list[str | None]:
        pairs = [await keys.find(database, one) for one in SERVED["secrets"].values()]
        return [pair and f"{pair[0].name} {pair[1]}" for pair in pairs]

    # The second was rotated since, with a long overlap.
    assert in_database(home, found) == ["app False", "limited True"]


def stable(peer: dict[str, Any]) -> dict[str, Any]:
    """What is known of a peer without a link to it."""
    names = ("id", "name", "addresses", "admin", "invited_by", "member_since", "limits", "cost")
    use = {name: peer["use"][name] for name in ("credit_limit", "owes", "unaccepted", "models")}
    return {**{name: peer[name] for name in names}, "use": use}


def test_a_home_is_served_as_before(home: Path, clock: None) -> None:
    """Stored responses, receipts with their openings, and peers."""
    asked = [f"/v1/responses/{one['id']}" for one in SERVED["responses"]]
    asked += [f"/v1/receipts/{one['receipt']['request_id']}" for one in RECEIPTS.values()]

    async def ask() -> tuple[list[Any], Any]:
        async with in_process(home) as (box, client):

            async def get(path: str, secret: str) -> Any:
                headers = {"Authorization": f"Bearer {secret}"}
                return (await client.get(path, headers=headers)).json()

            served = [await get(path, SERVED["secrets"]["app"]) for path in asked]
            return served, await get("/v1/admin/peers", box.control_token)

    served, peers = asyncio.run(ask())
    before = [*SERVED["responses"], *(one["receipt"] for one in RECEIPTS.values())]
    for one in (*served[: len(SERVED["responses"])], *SERVED["responses"]):
        one.pop("request_id", None)  # of the question, not of the response
    for one in served[len(SERVED["responses"]) :]:
        one.pop("inclusion")  # there was no log
    assert served == before
    of_before = SERVED["peers"]
    assert [stable(one) for one in peers["data"]] == [stable(one) for one in of_before["data"]]
    for name in ("id", "name", "network", "state"):
        assert peers["own"][name] == of_before["own"][name]
