"""Which of the answers of peers are audited, what waits for it, and what follows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from pinaivu_box import idle_time
from pinaivu_box.audits import pending, sampled
from pinaivu_box.audits.choice import FIRST_REQUESTS, AuditChoice, share
from pinaivu_box.audits.disproof import Evidence, verify_evidence
from pinaivu_box.audits.finding import Finding
from pinaivu_box.audits.pending import LegToAudit, PendingAudit, PendingAudits
from pinaivu_box.audits.prompts import are_others
from pinaivu_box.audits.sampled import SampledAudits
from pinaivu_box.audits.service import AuditConsequences
from pinaivu_box.config import AuditConfig
from pinaivu_box.errors import EngineLost, NoNodesAvailable
from pinaivu_box.home import database_of, prepare_home
from pinaivu_box.ledger import disproofs
from pinaivu_box.ledger import entry as ledger_entry
from pinaivu_box.policy import Policy
from pinaivu_box.policy_bounds import within
from pinaivu_box.receipts.receipt import ACCEPTANCE_DOMAIN
from pinaivu_box.receipts.transcript import RequestTranscript, decode
from pinaivu_box.routing.reputation import Reputation
from pinaivu_box.store import peer_tables
from pinaivu_box.store.database import Database
from pinaivu_box.store.peer_tables import PeerAudits
from tests.bench.audited_peer import GOAL_REQUESTS, Cheat, first_found
from tests.support.audited_legs import PRICE, WORD, key, leg, request
from tests.support.in_process_command import run_command, run_command_json
from tests.support.keys import IDENTITIES
from tests.support.waiting import soon, wait_until

pytestmark = pytest.mark.anyio
US, PEER, OTHER = IDENTITIES[:3]
CONFIG = AuditConfig()
EVERYTHING = AuditConfig(sample=1.0, first=1.0)
COUNTS = (107, 1963)  # of 10,000, of an old peer and a new one


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_time, "_IDLE_SECONDS", 0.02)
    monkeypatch.setattr(idle_time, "_LOOK_SECONDS", 0.005)


# -- the choice ------------------------------------------------------------------------------------


def chosen(choice: AuditChoice, peer: PeerAudits, requests: int = 10_000) -> list[int]:
    return [n for n in range(requests) if choice.is_chosen(f"req_{n}", peer, CONFIG)]


def test_the_shares_are_those_of_the_configuration() -> None:
    """Of a known secret the very numbers are known: 1 % and 20 % of 10,000, as chance has it."""
    choice = AuditChoice(b"a known secret")
    old, new = PeerAudits(watched=FIRST_REQUESTS), PeerAudits(watched=FIRST_REQUESTS - 1)
    assert (len(chosen(choice, old)), len(chosen(choice, new))) == COUNTS
    # What is chosen at a small share is at a larger one.
    assert set(chosen(choice, old)) < set(chosen(choice, new))


def test_numbers_are_spread_evenly() -> None:
    choice = AuditChoice(b"another one")
    tenths = [0] * 10
    for n in range(10_000):
        number = choice.number(f"req_{n}")
        assert 0 <= number < 1
        tenths[int(number * 10)] += 1
    assert all(900 < count < 1100 for count in tenths)  # of a binomial: over 3 deviations


def test_another_secret_chooses_others() -> None:
    peer = PeerAudits()
    one, two = (set(chosen(AuditChoice(secret), peer)) for secret in (b"one", b"two"))
    # As many in common as chance has: a fifth of a fifth.
    assert 300 < len(one & two) < 500


def test_nothing_and_everything() -> None:
    choice = AuditChoice(b"s")
    none, every = AuditConfig(sample=0.0, first=0.0), EVERYTHING
    ids = [f"req_{n}" for n in range(1000)]
    assert not any(choice.is_chosen(one, PeerAudits(), none) for one in ids)
    assert all(choice.is_chosen(one, PeerAudits(watched=1000), every) for one in ids)


def test_a_newcomer_is_audited_more_often() -> None:
    assert [share(PeerAudits(watched=n), CONFIG) for n in (0, 199, 200, 10_000)] == [
        0.2, 0.2, 0.01, 0.01
    ]  # fmt: skip


def test_a_new_peer_that_cheats_is_found_within_50_requests_in_99_of_100_runs() -> None:
    """If each audit of such an answer finds it, as in bitwise mode; in seeded runs."""
    found = [first_found(Cheat(), Random(seed)) for seed in range(100)]
    assert sum(number <= GOAL_REQUESTS for number in found) >= 99
    assert 3 <= sorted(found)[50] <= 5  # every fifth is audited


def test_a_key_is_left_out_and_so_are_those_that_it_makes(tmp_path: Path) -> None:
    home = tmp_path / "home"
    made = run_command_json("keys", "create", "--audit", "off", home=home)
    assert made["policy"]["audit"] == "off"
    for value, expected in (("on", "on"), ("off", "off"), ("none", "on")):
        edited = run_command_json("keys", "edit", made["id"], "--audit", value, home=home)
        assert edited["policy"]["audit"] == expected
    refused = run_command("keys", "create", "--audit", "maybe", home=home, check=False)
    assert refused.returncode == 2
    off = Policy(audit="off")
    assert within(Policy(), off).audit == "off" and within(off, Policy()).audit == "off"


def test_a_prompt_may_differ_where_templates_write_the_date() -> None:
    prompt = [*range(100)]
    dated = [*prompt[:20], *range(500, 516), *prompt[36:]]
    for same in (prompt, dated, [*prompt[:20], 7, *prompt[20:]], prompt[:-16]):
        assert not are_others(same, prompt) and not are_others(prompt, same)
    twice = [7, *prompt[1:-1], 7]
    for other in (
        [],
        prompt[:50],
        prompt[17:],
        [*prompt, *prompt],
        [*dated[:20], 9, *dated],
        twice,
    ):
        assert are_others(other, prompt) and are_others(prompt, other)


# -- what waits ------------------------------------------------------------------------------------


def waiting(peer: str = "node_1", size: int = 10, number: int = 0) -> PendingAudit:
    return PendingAudit(peer, f"req_{number}", b"x" * size, ())


def test_what_waits_is_bounded_in_number_and_bytes_and_for_each_peer() -> None:
    queue = PendingAudits()
    taken = [queue.add(waiting(number=n)) for n in range(30)]
    assert taken == [True] * pending.MAX_OF_PEER + [False] * (30 - pending.MAX_OF_PEER)
    taken = [queue.add(waiting(f"node_{n}")) for n in range(100)]
    assert sum(taken) == pending.MAX_AUDITS - pending.MAX_OF_PEER
    assert len(queue) == pending.MAX_AUDITS and queue.bytes == 10 * pending.MAX_AUDITS
    assert queue.take().request_id == "req_0"  # first come, first audited
    assert not queue.add(waiting("node_1", pending.MAX_BYTES))
    while queue:
        queue.take()
    assert queue.bytes == 0
    # Nor has one peer, with long answers, room for all.
    assert not queue.add(waiting(size=pending.MAX_BYTES_OF_PEER + 1))
    assert queue.add(waiting(size=pending.MAX_BYTES_OF_PEER - 5)) and not queue.add(waiting())
    rest = pending.MAX_BYTES - pending.MAX_BYTES_OF_PEER
    taken = [queue.add(waiting(f"node_{n}", 1024 * 1024)) for n in range(2, 40)]
    assert sum(taken) == rest // (1024 * 1024)
    assert queue.bytes <= pending.MAX_BYTES


def test_what_was_interrupted_too_often_is_given_up() -> None:
    queue, tries = PendingAudits(), 0
    audit = waiting()
    while queue.again(audit):
        audit = queue.take()
        tries += 1
    assert tries == pending.MAX_ATTEMPTS - 1 and not queue


# -- the audits ------------------------------------------------------------------------------------


class World:
    """Sampled audits whose legs are computed by `find`; `busy` says whether a request runs."""

    def __init__(self, config: AuditConfig = EVERYTHING) -> None:
        self.busy = self.busy_for_peers = False
        self.now = 0.0
        self.evading: list[str] = []
        self.replayed: list[tuple[RequestTranscript, Sequence[LegToAudit]]] = []
        self.finding = Finding("agreed")
        self.bad: list[tuple[str, Finding]] = []
        self.kept: dict[str, PeerAudits] = {}
        self.hold: asyncio.Event | None = None
        self.registry = CollectorRegistry()
        self.audits = SampledAudits(
            AuditChoice(b"s"), lambda: config, self.replay, lambda: self.busy,
            lambda: self.busy_for_peers, self, self.registry, lambda: self.now,
        )  # fmt: skip

    async def replay(
        self, transcript: RequestTranscript, legs: Sequence[LegToAudit]
    ) -> list[Finding]:
        self.replayed.append((transcript, legs))
        if self.hold is not None:
            await self.hold.wait()
        return [self.finding for _ in legs]

    async def keep(self, audits: dict[str, PeerAudits]) -> None:
        self.kept.update(audits)

    async def failed(self, audit: PendingAudit, leg: LegToAudit, finding: Finding) -> None:
        self.bad.append((audit.request_id, finding))

    def evaded(self, audit: PendingAudit) -> None:
        self.evading.append(audit.request_id)

    def counted(self, result: str) -> float:
        return self.registry.get_sample_value("pinaivu_audits_total", {"result": result}) or 0.0

    @property
    def of_peer(self) -> PeerAudits:
        return self.audits.audits[PEER.node_id]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    running = asyncio.create_task(made.audits.run())
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_what_a_peer_served_is_computed_again(world: World) -> None:
    record = request(PEER, legs=2)
    world.audits.take(record, key())
    await wait_until(lambda: world.counted("agreed") == 2)
    ((transcript, legs),) = world.replayed
    assert transcript.request_id == record.job.request_id and WORD in transcript.prompts[0].asked
    assert [one.proof.choice for one in legs] == [0, 1]
    assert world.of_peer == PeerAudits(watched=1, agreed=2) and world.of_peer.audits == 2


async def test_what_this_box_served_is_not(world: World) -> None:
    own = leg(US, request(PEER).job)
    own.proved = None
    world.audits.take(request(PEER, own=own), key())
    assert not world.audits.pending and not world.audits.audits


@pytest.mark.parametrize(
    ("policy", "more"),
    [({"audit": "off"}, {}), ({}, {"inputs": ["a text"]}), ({}, {"images": {"00": b""}})],
    ids=["a key that is left out", "vectors", "images"],
)
async def test_what_is_left_out_is_not_kept_for_a_moment(
    world: World, policy: dict[str, Any], more: dict[str, Any]
) -> None:
    world.audits.take(request(PEER, **more), key(**policy))
    assert not world.audits.pending and not world.audits.audits  # nor is it one of the first 200


async def test_after_a_failed_audit_a_peer_is_a_newcomer_again() -> None:
    world = World(AuditConfig(sample=0.0, first=1.0))
    for _ in range(FIRST_REQUESTS):
        world.audits.take(request(PEER), key())
    full = min(pending.MAX_OF_PEER, FIRST_REQUESTS)
    assert len(world.audits.pending) == full
    assert world.counted("dropped") == FIRST_REQUESTS - full
    while world.audits.pending:
        world.audits.pending.take()
    world.audits.take(request(PEER), key())
    assert not world.audits.pending  # it is old: none of its answers are audited
    # Another is audited, and fails.
    world.finding = Finding("failed", "it is too far away")
    world.audits.take(request(OTHER), key())
    running = asyncio.create_task(world.audits.run())
    await wait_until(lambda: world.bad)
    world.audits.audits[PEER.node_id] = world.audits.audits[OTHER.node_id]
    assert world.of_peer == PeerAudits(watched=0, failed=1) == world.kept[OTHER.node_id]
    world.audits.take(request(PEER), key())
    await wait_until(lambda: world.counted("failed") == 2)
    running.cancel()


async def test_it_waits_until_there_is_nothing_else_to_do(world: World) -> None:
    world.busy = True
    world.audits.take(request(PEER), key())
    await asyncio.sleep(0.1)
    assert not world.replayed
    world.busy = False
    await wait_until(lambda: world.counted("agreed") == 1)


async def test_requests_of_peers_delay_it_and_not_for_ever(world: World) -> None:
    """Else a peer would keep its own answers from being audited, by asking for others."""
    world.busy_for_peers = True
    world.audits.take(request(PEER), key())
    await asyncio.sleep(0.1)
    world.now = sampled.MAX_WAIT_SECONDS
    await asyncio.sleep(0.1)
    assert not world.replayed
    world.now += 1
    world.busy = True
    await asyncio.sleep(0.1)
    assert not world.replayed  # this box's own come first
    world.busy = False
    await wait_until(lambda: world.counted("agreed") == 1)


async def test_a_request_stops_it_and_it_is_tried_again(world: World) -> None:
    world.hold = asyncio.Event()
    world.audits.take(request(PEER), key())
    await wait_until(lambda: len(world.replayed) == 1)
    world.busy = True
    await wait_until(lambda: len(world.audits.pending) == 1)  # it was stopped
    world.hold, world.busy = None, False
    await wait_until(lambda: world.counted("agreed") == 1)
    assert len(world.replayed) == 2


def replays(world: World, number: int) -> bool:
    return len(world.replayed) == number


async def test_a_busy_box_gives_it_up(world: World) -> None:
    world.hold = asyncio.Event()
    world.audits.take(request(PEER, legs=2), key())
    for attempt in range(1, pending.MAX_ATTEMPTS + 1):
        await wait_until(partial(replays, world, attempt))
        world.busy = True
        # It is stopped: it waits again, or has been given up, with both of its legs.
        await wait_until(lambda: world.audits.pending or world.counted("interrupted") == 2)
        world.busy = False
    assert world.counted("interrupted") == 2
    assert not world.audits.pending and not world.evading
    assert world.of_peer == PeerAudits(watched=1, undecided=2)


async def test_an_answer_with_which_the_engine_ends_is_tried_again_and_counts(
    world: World,
) -> None:
    lost = 0

    async def lose(*_: Any) -> list[Finding]:
        nonlocal lost
        lost += 1
        raise EngineLost("It ended.")

    world.audits._replay = lose
    world.audits.take(request(PEER, legs=2), key())
    await wait_until(lambda: world.counted("error") == 2)
    assert lost == pending.MAX_ATTEMPTS and len(world.evading) == 1
    assert world.of_peer == PeerAudits(watched=1, undecided=2)


async def test_what_cannot_be_computed_here_says_nothing_of_the_peer(world: World) -> None:
    world.finding = Finding("not_auditable", "there is no such file here")
    world.audits.take(request(PEER), key())
    await wait_until(lambda: world.counted("not_auditable") == 1)

    async def refuse(*_: Any) -> list[Finding]:
        raise NoNodesAvailable(f"There is no room for {WORD}.")

    world.audits._replay = refuse
    world.audits.take(request(PEER), key())
    await wait_until(lambda: world.counted("not_auditable") == 2)
    assert world.of_peer == PeerAudits(watched=2, undecided=2) and not world.evading
    # What is so because of what the peer signed does.
    world.audits._replay = world.replay
    world.finding = Finding("not_auditable", "it has no end", evaded=True)
    record = request(PEER)
    world.audits.take(record, key())
    await wait_until(lambda: world.evading == [record.job.request_id])
    assert world.of_peer.undecided == 3 and not world.bad


async def test_a_mistake_of_ours_ends_one_audit_and_no_other(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    failing = count()

    async def fail(*_: Any) -> list[Finding]:
        if next(failing) == 0:
            raise ValueError(WORD)
        return [Finding("disproved", f"it said {WORD}")]

    world.audits._replay = fail
    for _ in range(2):
        world.audits.take(request(PEER), key())
    await wait_until(lambda: world.counted("error") == 1 and world.counted("disproved") == 1)
    assert world.of_peer == PeerAudits(watched=0, failed=1, disproved=1, undecided=1)
    # No word of a prompt or an answer is in the log.
    lines = [f"{one.getMessage()} {vars(one)}" for one in caplog.records]
    assert lines and not any(WORD in line or "spotted" in line for line in lines)


# -- what follows ----------------------------------------------------------------------------------


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with database_of(prepare_home(tmp_path)) as opened:
        yield opened


async def store_receipt(database: Database, request_id: str) -> None:
    await database.write(
        (
            "INSERT INTO keys (id, account_id, hash, prefix, last_four, name, policy, created_at)"
            " VALUES ('key_1', 'acct_owner', x'00', '', '', '', '{}', 0)",
            (),
        ),
        (
            "INSERT INTO receipts (request_id, key_id, created_at, signed, signature, opening)"
            " VALUES (?, 'key_1', 1, x'', x'', x'')",
            (request_id,),
        ),
    )


async def test_a_disproof_takes_the_reputation_and_the_debt(database: Database) -> None:
    reputation = Reputation(lambda: 1_000_000.0)
    record = request(PEER)
    (one,) = record.served
    assert one.proved is not None
    signed = one.proved.signed
    accepted = US.sign(ACCEPTANCE_DOMAIN, signed.signed.encode())
    owed = ledger_entry.of_leg(PEER.node_id, one.proved.proof, signed, True, accepted)
    await ledger_entry.record(database, owed, US.node_id)
    before = (await ledger_entry.balance(database, PEER.node_id))["credits"]
    assert before.owed_to_peer == owed.amount > 0
    await store_receipt(database, record.job.request_id)
    audits = SampledAudits(
        AuditChoice(b"s"), lambda: EVERYTHING, disprove, lambda: False, lambda: False,
        AuditConsequences(US, database, reputation), CollectorRegistry(),
    )  # fmt: skip
    audits.take(record, key())
    running = asyncio.create_task(audits.run())
    await wait_until(lambda: audits.audits[PEER.node_id].disproved)
    await wait_for_rows(database)
    running.cancel()
    assert reputation.score(PEER.node_id) < 0.01 and reputation.distrusts(PEER.node_id)
    after = (await ledger_entry.balance(database, PEER.node_id))["credits"]
    assert after.owed_to_peer == 0 and after.disproved == owed.amount
    assert after.net == before.net  # both boxes have signed that, and still say so
    (stored,) = await disproofs.ls(database, PEER.node_id)
    assert (stored.amount, stored.currency) == (owed.amount, PRICE.currency)
    evidence = msgspec.json.encode(Evidence(stored.signed.decode(), stored.signature.hex()))
    assert [check.ok for check in verify_evidence(evidence)] == [True] * 4
    # Of the prompt nothing is in the database but what its key's secret opens.
    for path in database.path.parent.glob("pinaivu.db*"):
        assert WORD.encode() not in path.read_bytes()
    ((sealed_to, body),) = await database.read("SELECT sealed_to, body FROM transcripts")
    assert sealed_to == key().transcript_key and WORD.encode() not in body
    known = await peer_tables.load(database, PeerAudits)
    assert known == {PEER.node_id: PeerAudits(watched=0, failed=1, disproved=1)}


async def disprove(_: RequestTranscript, legs: Sequence[LegToAudit]) -> list[Finding]:
    report = {"first": {"position": 3, "logit": 1.5}}
    return [Finding("disproved", "another token was drawn at position 3", report) for _ in legs]


async def wait_for_rows(database: Database) -> None:
    async with asyncio.timeout(60):
        while not await database.read("SELECT 1 FROM peer_audits WHERE disproved"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_who_evades_audits_loses_reputation_and_is_still_asked(database: Database) -> None:
    reputation = Reputation(lambda: 0.0)
    consequences = AuditConsequences(US, database, reputation)
    scores = []
    for _ in range(100):
        consequences.evaded(PendingAudit(PEER.node_id, "req_1", b"", ()))
        scores.append(reputation.score(PEER.node_id))
    assert scores[0] == pytest.approx(0.5**0.25) and scores[3] == pytest.approx(0.5)
    assert scores[-1] == pytest.approx(0.25) and not reputation.distrusts(PEER.node_id)
    assert "req_1 could not be audited" in reputation.why(PEER.node_id)


async def test_evidence_that_was_changed_is_refused(database: Database) -> None:
    consequences = AuditConsequences(US, database, Reputation(lambda: 0.0))
    record = request(PEER)
    audits = SampledAudits(
        AuditChoice(b"s"), lambda: EVERYTHING, disprove, lambda: True, lambda: False,
        consequences, CollectorRegistry(),
    )  # fmt: skip
    audits.take(record, key())
    audit = audits.pending.take()
    (finding,) = await disprove(decode(audit.transcript), audit.legs)
    await consequences.failed(audit, audit.legs[0], finding)
    await consequences.failed(audit, audit.legs[0], finding)  # the same again changes nothing
    (stored,) = await disproofs.of_request(database, audit.request_id)
    good = Evidence(stored.signed.decode(), stored.signature.hex())
    assert all(check.ok for check in verify_evidence(msgspec.json.encode(good)))

    def refused(document: bytes) -> bool:
        return not all(check.ok for check in verify_evidence(document))

    replace = msgspec.structs.replace
    for old, new in (
        (PEER.node_id, OTHER.node_id), ("position 3", "position 4"), ("1.5", "2.5"),
        (audit.request_id, "req_other"), ("bitwise:", "statistical:"),
    ):  # fmt: skip
        assert old in good.signed
        changed = replace(good, signed=good.signed.replace(old, new))
        assert refused(msgspec.json.encode(changed))
    assert refused(msgspec.json.encode(replace(good, signature="0" * 128)))
    for document in (b"", b"{}", b"null", msgspec.json.encode(good)[:-1]):
        assert refused(document)


async def test_what_is_known_of_peers_outlives_the_box(database: Database) -> None:
    consequences = AuditConsequences(US, database, Reputation(lambda: 0.0))
    audits = SampledAudits(
        AuditChoice(b"s"), lambda: CONFIG, disprove, lambda: True, lambda: False,
        consequences, CollectorRegistry(),
    )  # fmt: skip
    for _ in range(3):
        audits.take(request(PEER), key())
    await soon(audits.save())
    assert await peer_tables.load(database, PeerAudits) == {PEER.node_id: PeerAudits(watched=3)}
