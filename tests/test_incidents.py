"""Incidents and uptime: what is noted, when it ends, and what is known after a restart."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pinaivu_box.config import RetentionConfig
from pinaivu_box.incidents import (
    DAY_MS,
    DayOfUptime,
    IncidentMetrics,
    Incidents,
    PeerUptime,
    uptime,
    uptime_of_peers,
)
from pinaivu_box.network.peer import Peer
from pinaivu_box.server.app import create_app
from pinaivu_box.store import incidents, peers, retention
from pinaivu_box.store.database import Database
from pinaivu_box.store.incidents import Incident, Run
from pinaivu_box.store.times import now_ms
from tests.support.fake_model import FAKE
from tests.support.in_process_box import in_process_box
from tests.support.memory_transport import MemoryNetwork
from tests.support.unlogged import unlogged

pytestmark = pytest.mark.anyio
MIDNIGHT = 20_000 * DAY_MS
HOUR = DAY_MS // 24


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with Database(tmp_path / "box.db") as opened:
        yield opened


@pytest.fixture
async def noted(database: Database) -> AsyncIterator[Incidents]:
    running = Incidents(database)
    await running.open()
    yield running
    await running.close()


async def written(noted: Incidents, database: Database) -> list[Incident]:
    await noted.settled()
    return await incidents.recent(database, 100)


def answer(noted: Incidents, *, well: int, unavailable: int) -> None:
    for status in [200] * well + [503] * unavailable:
        noted.answered(status)


async def test_a_minute_with_many_503_is_an_incident_until_one_without(
    noted: Incidents, database: Database
) -> None:
    answer(noted, well=99, unavailable=1)  # one in a hundred is not more than 1 %
    await noted.minute_is_over()
    assert await written(noted, database) == []
    answer(noted, well=98, unavailable=1)
    await noted.minute_is_over()
    answer(noted, well=0, unavailable=3)
    await noted.minute_is_over()
    (incident,) = await written(noted, database)
    assert (incident.kind, incident.ended_at) == ("errors", None)
    assert "3 of 3 requests" in incident.detail  # of the worst minute
    assert noted.open_count == 1
    answer(noted, well=5, unavailable=0)
    await noted.minute_is_over()
    (incident,) = await written(noted, database)
    assert incident.ended_at is not None and incident.ended_at >= incident.began_at
    assert noted.open_count == 0


async def test_an_incident_of_errors_tells_of_its_worst_minute(
    noted: Incidents, database: Database
) -> None:
    for well, unavailable in ((90, 10), (50, 50), (80, 20)):
        answer(noted, well=well, unavailable=unavailable)
        await noted.minute_is_over()
    (incident,) = await written(noted, database)
    assert "50 of 100 requests" in incident.detail and incident.ended_at is None
    assert noted.counts["errors"] == 1


async def test_minutes_without_requests_are_no_incident(
    noted: Incidents, database: Database
) -> None:
    await noted.minute_is_over()
    assert await written(noted, database) == []


async def test_only_requests_that_would_run_a_model_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with in_process_box(MemoryNetwork(), tmp_path / "anna", (FAKE,)) as one:
        counted: list[int] = []
        monkeypatch.setattr(one.box.incidents, "answered", counted.append)
        for method, path in (("GET", "/v1/models"), ("GET", "/v1/nothing"), ("POST", "/v1/no")):
            await one.http(method, path)
        assert counted == []
        assert (await one.chat(model="unknown")).status_code == 404
        path = "/v1/conversations/conv_none/answers"  # of a session's account only
        answer = await one.http("POST", path, json={"content": "Hi", "model": FAKE})
        assert counted == [404, answer.status_code]


async def test_an_engine_that_dies_is_an_incident_of_a_moment(
    noted: Incidents, database: Database
) -> None:
    noted.engine_died("mini:1b")
    (incident,) = await written(noted, database)
    assert (incident.kind, incident.subject) == ("engine", "mini:1b")
    assert incident.began_at == incident.ended_at
    assert noted.open_count == 0


async def test_a_lost_peer_is_an_incident_until_it_is_back(
    noted: Incidents, database: Database
) -> None:
    noted.peer_lost("node_a")
    noted.peer_lost("node_a")  # both ends of a link may say so
    noted.peer_lost("node_b")
    noted.peer_is_back("node_a")
    noted.peer_is_back("node_never_lost")
    ended = {one.subject: one.ended_at for one in await written(noted, database)}
    assert set(ended) == {"node_a", "node_b"}
    assert ended["node_a"] is not None and ended["node_b"] is None
    noted.is_back = lambda peer, _lost_at: peer == "node_b"  # others have heard from it
    await noted.minute_is_over()
    assert all(one.ended_at is not None for one in await written(noted, database))


async def test_a_restart_ends_what_was_open_when_the_box_was_seen_last(database: Database) -> None:
    then = now_ms() - HOUR
    await incidents.begin_run(database, then - HOUR)
    await incidents.save(database, [Incident("inc_1", "peer", "node_a", then - 1, None, "Lost.")])
    await incidents.still_running(database, then)
    again = Incidents(database)  # the one before was killed
    await again.open()
    (incident,) = await incidents.recent(database, 10)
    assert incident.ended_at == then
    first, second = await incidents.runs(database)
    assert first == Run(then - HOUR, then)
    assert second.began_at >= then + HOUR
    await again.close()


async def test_what_cannot_be_written_is_written_later(
    noted: Incidents, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(incidents, "save", full)
        noted.peer_lost("node_a")
        await noted.settled()
        noted.peer_is_back("node_a")
        assert await written(noted, database) == []
    await noted.minute_is_over()
    (incident,) = await written(noted, database)
    assert incident.ended_at is not None


async def test_incidents_are_kept_for_90_days(database: Database) -> None:
    now = now_ms()
    for age, name in ((89, "young"), (91, "old")):
        at = now - age * DAY_MS
        await incidents.save(database, [Incident(name, "engine", "m", at, at, "It died.")])
        await incidents.begin_run(database, at)
    open_since = now - 95 * DAY_MS
    await incidents.save(database, [Incident("open", "peer", "p", open_since, None, "Lost.")])
    await retention.apply(database, RetentionConfig(), now, unlogged)
    assert {one.id for one in await incidents.recent(database, 10)} == {"young", "open"}
    assert len(await incidents.runs(database)) == 1


async def test_incidents_are_in_the_metrics(noted: Incidents) -> None:
    noted.engine_died("mini:1b")
    noted.peer_lost("node_a")
    registry = CollectorRegistry()
    registry.register(IncidentMetrics(noted))
    text = generate_latest(registry).decode()
    assert 'pinaivu_incidents_total{kind="engine"} 1.0' in text
    assert 'pinaivu_incidents_total{kind="errors"} 0.0' in text
    assert "pinaivu_incidents_open 1.0" in text


async def test_uptime_is_computed_once_however_many_ask(
    noted: Incidents, database: Database
) -> None:
    (first,) = {id(days) for days in await asyncio.gather(*(noted.uptime() for _ in range(20)))}
    assert id(await noted.uptime()) == first
    (today,) = (await noted.uptime()).days or [DayOfUptime(0, 0, 0)]
    assert today.running == today.known


def test_uptime_is_counted_day_by_day_from_the_first_run() -> None:
    runs = [
        Run(MIDNIGHT + 12 * HOUR, MIDNIGHT + 18 * HOUR),
        Run(MIDNIGHT + DAY_MS - HOUR, MIDNIGHT + DAY_MS + 6 * HOUR),
        Run(MIDNIGHT + DAY_MS + 5 * HOUR, MIDNIGHT + DAY_MS + 7 * HOUR),  # a clock was set back
    ]
    now = MIDNIGHT + DAY_MS + 10 * HOUR
    hour = HOUR // 1000
    assert uptime(runs, now, 90) == [
        DayOfUptime(MIDNIGHT, 12 * hour, 7 * hour),  # nothing is known of the morning
        DayOfUptime(MIDNIGHT + DAY_MS, 10 * hour, 7 * hour),
    ]
    assert uptime(runs, now, 1) == [DayOfUptime(MIDNIGHT + DAY_MS, 10 * hour, 7 * hour)]
    assert uptime([], now, 90) == []
    back = [Run(now - 2 * HOUR, now - HOUR), Run(now - 3 * HOUR, now - HOUR // 2)]
    assert uptime(back, now, 90) == [DayOfUptime(MIDNIGHT + DAY_MS, 3 * 3600, 9000)]
    ahead = [Run(now - HOUR, now + 1000 * DAY_MS), Run(now - 5 * DAY_MS, now - 5 * DAY_MS + HOUR)]
    assert [day.running for day in uptime(ahead, now, 90)] == [3600, 0, 0, 0, 0, 3600]


def test_a_peer_is_missed_while_it_is_lost_and_this_box_runs() -> None:
    runs = [
        Run(MIDNIGHT, MIDNIGHT + 10 * HOUR),
        Run(MIDNIGHT + 9 * HOUR, MIDNIGHT + 12 * HOUR),  # a clock was set back
        Run(MIDNIGHT + 20 * HOUR, MIDNIGHT + 24 * HOUR),
    ]
    now = MIDNIGHT + 22 * HOUR

    def loss(subject: str, began: int, ended: int | None) -> Incident:
        end = None if ended is None else MIDNIGHT + ended * HOUR
        return Incident(f"{subject}{began}", "peer", subject, MIDNIGHT + began * HOUR, end, "")

    losses = [
        loss("flaps", 1, 3),
        loss("old", 1, 5),  # before it is known to have been a peer
        loss("flaps", 2, 4),
        loss("stays away", 11, 21),  # of which this box ran for two hours
        loss("gone", 21, None),
    ]
    first_links = {
        "fine": MIDNIGHT + 8 * HOUR, "flaps": MIDNIGHT, "old": MIDNIGHT + 4 * HOUR,
        "stays away": MIDNIGHT - 200 * DAY_MS, "gone": MIDNIGHT + 20 * HOUR, "new": now,
        "of a clock that was ahead": now + DAY_MS,
    }  # fmt: skip
    hour = HOUR // 1000
    assert uptime_of_peers(runs, losses, first_links, now, 90) == {
        "fine": PeerUptime(MIDNIGHT + 8 * HOUR, 6 * hour, 6 * hour),
        "flaps": PeerUptime(MIDNIGHT, 14 * hour, 11 * hour),
        "old": PeerUptime(MIDNIGHT + 4 * HOUR, 10 * hour, 9 * hour),
        "stays away": PeerUptime(MIDNIGHT - 89 * DAY_MS, 14 * hour, 12 * hour),
        "gone": PeerUptime(MIDNIGHT + 20 * HOUR, 2 * hour, 1 * hour),
    }


async def test_the_uptime_of_peers_is_of_those_that_there_was_a_link_with(
    noted: Incidents, database: Database
) -> None:
    await peers.record_seen(database, {"node_a": [], "node_b": []}, linked={"node_a"})
    now = now_ms()
    await incidents.begin_run(database, now - HOUR)
    await database.write(("UPDATE peers SET first_seen = first_seen - ?", (HOUR // 2,)))
    await incidents.save(
        database, [Incident("inc_1", "peer", "node_a", now - HOUR // 4, now - HOUR // 8, "")]
    )
    seen = (await noted.uptime()).peers
    assert set(seen) == {"node_a"} and seen["node_a"].known >= HOUR // 2000 - 1
    assert seen["node_a"].known - seen["node_a"].up in (HOUR // 8000, HOUR // 8000 + 1)


async def test_the_public_sees_the_uptime_of_peers_and_nothing_secret_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "anna"
    async with in_process_box(MemoryNetwork(), path, explorer__access="public") as one:
        met, unmet = (peer(f"node_{name}", f"peer-{name}") for name in "ab")
        monkeypatch.setattr(one.network, "peers", lambda: [met, unmet])
        database, now = one.box.database, now_ms()
        await peers.record_seen(database, {"node_a": []}, linked={"node_a"})
        await database.write(
            ("UPDATE peers SET first_seen = ?", (now - HOUR,)),
            ("UPDATE runs SET began_at = ?", (now - HOUR,)),
        )
        await incidents.save(
            database, [Incident("inc_1", "peer", "node_a", now - HOUR // 2, now, "It was lost.")]
        )
        app = httpx.ASGITransport(create_app(one.box))
        async with httpx.AsyncClient(transport=app, base_url="http://box") as anybody:
            told = await anybody.get("/v1/explorer/network")
            page = await anybody.get("/explorer/network", headers={"accept": "text/html"})
        known = (await one.http("GET", "/v1/explorer/network")).json()
    own, first, second = told.json()["boxes"]
    assert own["seen"] is None and second["seen"] is None and first["name"] == ""
    seen = first["seen"]
    assert seen["known"] >= HOUR // 1000 > HOUR // 2000 >= seen["known"] - seen["up"] > 0
    share = re.search(r"<span title=\"Since [^\"]*\">([0-9.]+) %</span>", page.text)
    assert share is not None and 49 <= float(share[1]) <= 51
    assert "not known" in page.text and "what this one saw of it" in page.text
    for text in (told.text, page.text):
        assert "peer-" not in text and "price" not in text and "score" not in text
    assert [box["name"] for box in known["boxes"][1:]] == ["peer-a", "peer-b"]


def peer(node_id: str, name: str) -> Peer:
    return Peer(
        node_id=node_id, name=name, state="connecting", why="", addresses=(), route=None,
        software="", clock_ahead=None, advert=None, advert_at=None, gone=False, inviter="",
        admin=False, issued_at=None, loads={},
    )  # fmt: skip
