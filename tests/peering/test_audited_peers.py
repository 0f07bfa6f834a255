"""Three boxes with a real model, of which one serves another file under its digest."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pinaivu_box import idle_time
from pinaivu_box.audits.disproof import Evidence, verify_evidence
from pinaivu_box.config import ModelConfig
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.local import LocalLeg
from pinaivu_box.home import database_of, prepare_home
from pinaivu_box.models import bundled
from pinaivu_box.store.peer_tables import PeerAudits
from tests.support.in_process_box import InProcessBox, in_process_box
from tests.support.in_process_command import run_command
from tests.support.memory_transport import MemoryNetwork
from tests.support.process_box import MODEL
from tests.support.random_weights import quantised
from tests.support.waiting import soon, wait_until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        " avx2 " not in Path("/proc/cpuinfo").read_text(), reason="a processor without AVX2"
    ),
]
Q4_0 = 2  # llama.cpp's number of the file type
WORD = "Wolpertinger"
LONG = "Tell me of each of these animals how it spends the winter: " + "fox, hen, bear, " * 20
SMALL: dict[str, Any] = {
    "engine__context": 512, "engine__max_sequences": 2, "engine__threads": 1,
    "engine__cpu_variant": "haswell",
}  # fmt: skip


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class World:
    """`anna` asks the cheapest: `carl`, who computes with another file than he says, if she may,
    or else `ben`.  She computes again all that is served to her."""

    def __init__(self, anna: InProcessBox, ben: InProcessBox, carl: InProcessBox) -> None:
        self.anna, self.ben, self.carl = anna, ben, carl

    async def key(self, **policy: Any) -> str:
        body = {"name": "some", "policy": policy}
        made = await self.anna.http("POST", "/v1/admin/keys", json=body)
        return str(made.json()["key"])

    async def ask(self, secret: str, text: str = WORD) -> str:
        """The id of a request."""
        answer = await self.anna.chat(text, secret, model=MODEL, max_tokens=12, seed=3)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    async def server_of(self, request_id: str) -> str:
        found = (await self.anna.http("GET", f"/v1/receipts/{request_id}")).json()
        return str(found["node_id"])

    def known(self, peer: InProcessBox) -> PeerAudits:
        audits = self.anna.box.audits
        assert audits is not None
        return audits.sampled.audits[peer.node_id]

    async def shown(self, peer: str) -> dict[str, Any]:
        return dict((await self.anna.http("GET", f"/v1/admin/peers/{peer}")).json())


def settings(price: str, **more: Any) -> dict[str, Any]:
    return {**SMALL, "pricing__per_1k_tokens": price, **more}


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(idle_time, "_IDLE_SECONDS", 0.05)
    monkeypatch.setattr(idle_time, "_LOOK_SECONDS", 0.02)
    location = bundled.find()
    assert location is not None
    other = quantised(location.path, tmp_path / "other.gguf", Q4_0)
    config = ModelConfig(name=MODEL, path=str(other))
    net = MemoryNetwork()
    asks: dict[str, Any] = {"peering__policy": "cheapest", "audit__first": 1.0}
    async with AsyncExitStack() as boxes:
        enter = boxes.enter_async_context
        anna = await enter(in_process_box(net, tmp_path / "anna", **settings("10", **asks)))
        ben = await enter(in_process_box(net, tmp_path / "ben", **settings("0.02")))
        await lie(tmp_path / "carl", other, await digest_of(ben))
        carl = await enter(in_process_box(net, tmp_path / "carl", (config,), **settings("0.01")))
        assert await digest_of(carl) == await digest_of(ben)
        for newcomer in (ben, carl):
            await soon(newcomer.network.join(await anna.network.invite()))
        await wait_until(lambda: offers(anna) == 2)
        yield World(anna, ben, carl)


async def digest_of(box: InProcessBox) -> str:
    (model,) = [one for one in box.box.catalog.models if one.id == MODEL]
    return await box.box.digests.of(model)


async def lie(home: Path, file: Path, digest: str) -> None:
    """The box on that home will say that its file has that digest."""
    facts = file.stat()  # noqa: ASYNC240
    row = (str(file), facts.st_size, facts.st_mtime_ns, digest)
    async with database_of(prepare_home(home)) as database:
        await database.write(("INSERT INTO model_files VALUES (?, ?, ?, ?)", row))


def offers(box: InProcessBox) -> int:
    return sum(one.id == MODEL for _, one in box.pool.candidates._offers())


async def test_who_serves_another_file_is_found_and_loses_its_reputation(
    world: World, tmp_path: Path
) -> None:
    anna, ben, carl = world.anna, world.ben, world.carl
    honest = await world.ask(await world.key(peers=["ben"]))
    assert await world.server_of(honest) == ben.node_id
    await wait_until(lambda: world.known(ben).audits == 1)
    assert world.known(ben) == PeerAudits(watched=1, agreed=1)

    left_out = await world.ask(await world.key(peers=["carl"], audit="off"))
    assert await world.server_of(left_out) == carl.node_id
    assert world.known(carl) == PeerAudits()

    secret = await world.key(peers=["ben", "carl"])
    false = await world.ask(secret)
    assert await world.server_of(false) == carl.node_id  # he is the cheapest
    await wait_until(lambda: world.known(carl).disproved == 1)
    shown = await world.shown("carl")
    assert shown["audits"] == {"count": 1, "failed": 1, "disproved": 1, "undecided": 0}
    assert shown["reputation"]["value"] < 0.01 and false in shown["reputation"]["why"]
    honest_one = {"count": 1, "failed": 0, "disproved": 0, "undecided": 0}
    assert (await world.shown("ben"))["audits"] == honest_one
    page = await anna.page("/admin/peers")
    assert "Audits" in page and "1 failed" in page
    metrics = (await anna.http("GET", "/metrics")).text
    assert 'pinaivu_audits_total{result="disproved"} 1.0' in metrics
    # From now on he is not asked, cheap as he is.
    assert await world.server_of(await world.ask(secret)) == ben.node_id

    await is_evident(world, tmp_path, false, secret)


async def test_who_cuts_the_prompt_short_is_found(world: World) -> None:
    """Although all that it says of the shorter one is so, to the bit."""
    ben = world.ben
    start = ben.box.local.start

    def cut_short(job: Job) -> LocalLeg:
        (message,) = job.messages
        return start(replace(job, messages=[{**message, "content": message["content"][:40]}]))

    secret = await world.key(peers=["ben"])
    await world.ask(secret, LONG)
    await wait_until(lambda: world.known(ben).audits == 1)
    assert world.known(ben) == PeerAudits(watched=1, agreed=1)
    ben.pool.serving._local.start = cut_short  # type: ignore[method-assign]
    request_id = await world.ask(secret, LONG)
    assert await world.server_of(request_id) == ben.node_id
    await wait_until(lambda: world.known(ben).failed == 1)
    assert world.known(ben).disproved == 0  # templates can be configured: it is no proof
    why = (await world.shown("ben"))["reputation"]["why"]
    assert "(1.0 disputes)" in why and request_id in why


async def is_evident(world: World, folder: Path, request_id: str, secret: str) -> None:
    """What he signed is not owed, and what shows it is verified offline, by who has the key."""
    home = world.anna.box.home

    def ran(*args: str, **env: str) -> Any:
        done = run_command(*args, "--json", home=home, env=env)
        return json.loads(done.stdout)

    (balance,) = [one for one in ran("ledger") if one["peer"] == world.carl.node_id]
    (disproof,) = ran("ledger", "disproofs", "carl")
    assert (
        disproof["request_id"] == request_id and disproof["amount"] == balance["disproved"] != "0"
    )
    assert "token" in disproof["why"] or "numbers" in disproof["why"]
    over_http = (await world.anna.http("GET", "/v1/admin/ledger/disproofs?peer=carl")).json()
    assert over_http["data"] == [disproof]
    sealed = ran("ledger", "evidence", request_id)
    assert sealed["transcript"] is None
    document = json.dumps(ran("ledger", "evidence", request_id, PINAIVU_API_KEY=secret))
    assert WORD in document
    checks = verify_evidence(document.encode())
    assert [(check.name, check.ok) for check in checks] == [
        (name, True) for name in ("auditor", "proof", "promise", "transcript")
    ]
    file = folder / "evidence.json"
    file.write_text(document)
    assert run_command("ledger", "check-evidence", str(file), home=folder).returncode == 0
    other = msgspec.json.decode(document, type=Evidence)
    assert other.transcript is not None
    (leg,) = other.transcript.legs
    changed = msgspec.structs.replace(leg, tokens=[1, *leg.tokens[1:]])
    other = msgspec.structs.replace(
        other, transcript=msgspec.structs.replace(other.transcript, legs=[changed])
    )
    file.write_bytes(msgspec.json.encode(other))
    refused = run_command("ledger", "check-evidence", str(file), home=folder, check=False)
    assert refused.returncode == 1 and "not what was committed to" in refused.stdout
    # A third box, which has the file, computes the leg again from what is in the document.
    receipt, transcript = folder / "receipt.json", folder / "transcript.json"
    whole = json.loads(document)
    receipt.write_text(json.dumps(whole["receipt"]))
    view = {"request_id": request_id, "transcript": whole["transcript"]}
    transcript.write_text(json.dumps(view))
    done = run_command(
        "receipts", "audit", str(receipt), "--transcript", str(transcript), "--json",
        home=world.ben.box.home, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "differs" and report["legs"][0]["mode"] == "bitwise"
    # Of the prompt nothing was written that the key's secret is not needed for.
    with closing(sqlite3.connect(home / "pinaivu.db")) as database:
        database.execute("PRAGMA wal_checkpoint")
    for path in home.glob("pinaivu.db*"):
        assert WORD.encode() not in path.read_bytes()
