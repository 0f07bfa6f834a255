"""Witnesses in a network: real boxes of this process, and members that show what they like."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pinaivu_box.errors import PeeringError
from pinaivu_box.identity import Identity
from pinaivu_box.log import checkpoint, entry_proof, evidence, note
from pinaivu_box.log.merkle import is_consistent
from pinaivu_box.receipts.verify import LogPolicy, verify_receipt
from pinaivu_box.store import log as store
from pinaivu_box.store import witnessed
from pinaivu_box.transport.link import Stream
from pinaivu_box.transport.rpc import MessageStream
from pinaivu_box.witness import wire as log_wire
from pinaivu_box.witness import wiring
from pinaivu_box.witness.questions import Questions
from pinaivu_box.witness.seen import MAX_LOGS_PER_BOX
from pinaivu_box.witness.wire import Answer, Question
from tests.support.fake_model import FAKE
from tests.support.fake_peer import FakePeer
from tests.support.in_process_box import InProcessBox, count_offers, in_process_box
from tests.support.in_process_command import run_command
from tests.support.keys import known_identity
from tests.support.memory_transport import MemoryNetwork, MemoryTransport
from tests.support.waiting import soon, wait_until
from tests.support.written_log import WrittenLog, cosignature_time, tree_hash

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def rounds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "ROUND_SECONDS", 3600.0)


class LogPeer(FakePeer):
    """A member whose log is the test's.  `respond` answers what it is asked."""

    def __init__(self, net: MemoryNetwork, identity: Identity, home: Path, name: str) -> None:
        transport = MemoryTransport(net, identity.node_id, None, f"at:{name}")
        super().__init__(identity, transport, home, name)
        self.respond: Callable[[str, Question], Answer | None] = lambda _peer, _question: None
        self.asked: list[Question] = []
        self.network.handlers[log_wire.PURPOSE] = self._answer_all
        self.questions = Questions(self.network)

    async def _answer_all(self, peer: str, stream: Stream) -> None:
        conversation: MessageStream[Answer, Question] = MessageStream(
            peer, stream, log_wire.questions, receive_seconds=60
        )
        async with conversation:
            while (question := await conversation.receive()) is not None:
                self.asked.append(question)
                answer = self.respond(peer, question)
                if answer is None:
                    await asyncio.sleep(3600)  # silence
                else:
                    await conversation.send(answer)

    async def ask(self, peer: str, question: Question) -> Any:
        kinds = (log_wire.Cosigned, log_wire.SizeConflict, log_wire.Compared, log_wire.Known)
        return await soon(self.questions.ask(peer, question, kinds))

    async def submit(self, peer: str, log: WrittenLog, old: int, size: int | None = None) -> Any:
        proof = tuple(log.proof(old, size))
        return await self.ask(peer, log_wire.Submit(old, proof, log.note(size)))

    def proves(self, log: WrittenLog) -> None:
        """It answers as the box with that log does, whoever asks, and cosigns nothing."""

        def respond(_peer: str, question: Question) -> Answer | None:
            if isinstance(question, log_wire.AskConsistency):
                if question.new > len(log.entries):
                    return log_wire.Declined(404, "it has not so many entries")
                root = tree_hash(log.entries[: question.old])
                return log_wire.Consistency(root, tuple(log.proof(question.old, question.new)))
            return log_wire.Declined(404, "nothing")

        self.respond = respond


@contextlib.asynccontextmanager
async def boxes(home: Path, *names: str) -> AsyncIterator[list[InProcessBox]]:
    """Whole boxes of one network, each with a model."""
    net = MemoryNetwork()
    async with contextlib.AsyncExitStack() as stack:
        made = [
            await stack.enter_async_context(in_process_box(net, home / name, (FAKE,)))
            for name in names
        ]
        for box in made[1:]:
            await soon(box.network.join(await made[0].network.invite()))
        await all_connected(*made, peers=len(made) - 1)
        yield made


def connected(box: InProcessBox) -> int:
    return sum(one.state == "connected" for one in box.network.peers())


async def all_connected(*made: InProcessBox, peers: int = 1) -> None:
    await wait_until(lambda: all(connected(box) == peers for box in made))


async def cosigned_by(box: InProcessBox, *witnesses: str) -> None:
    cosigned = box.box.witnessing.cosigning.cosigned
    await wait_until(lambda: cosigned.keys() == set(witnesses))


@contextlib.asynccontextmanager
async def with_liar(home: Path, *names: str) -> AsyncIterator[tuple[list[InProcessBox], LogPeer]]:
    """Boxes, and a member whose log the test writes."""
    net, identity = MemoryNetwork(), known_identity(77)
    async with contextlib.AsyncExitStack() as stack:
        made = [await stack.enter_async_context(in_process_box(net, home / name)) for name in names]
        liar = LogPeer(net, identity, home, "liar")
        await stack.enter_async_context(liar)
        for newcomer in (*(box.network for box in made[1:]), liar.network):
            await soon(newcomer.join(await made[0].network.invite()))
        await all_connected(*made, peers=len(made))
        yield made, liar


async def alarms(box: InProcessBox, *kinds: str) -> list[Any]:
    """Once there are those."""
    kept = box.box.witnessing.alarms

    def found() -> list[str]:
        return sorted(each.kind for each in kept.all.values())

    await wait_until(lambda: found() == sorted(kinds))
    return list(kept.all.values())


# -- boxes that are honest ------------------------------------------------------------------------


async def test_three_boxes_cosign_each_other(tmp_path: Path) -> None:
    async with boxes(tmp_path, "anna", "ben", "carl") as made:
        answers = {box.node_id: (await box.chat()).json() for box in made}
        for box in made:
            await box.http("GET", "/v1/log/checkpoint")
            await box.box.witnessing.round()
        for box in made:
            witnesses = {one.node_id for one in made} - {box.node_id}
            await cosigned_by(box, *witnesses)
            path = f"/v1/log/proof/{answers[box.node_id]['request_id']}"
            proof = entry_proof.read((await box.http("GET", path)).text)
            signed = checkpoint.read(proof.note)
            assert checkpoint.is_signed(proof.note, signed) and signed.size == 1
            assert set(checkpoint.witnesses_named(proof.note)) == witnesses
            for line in str(proof.note).splitlines()[5:]:
                key = bytes.fromhex(line.split(" ")[1].removeprefix("pinaivu/witness/node_"))
                cosignature_time(line, key, proof.note.text)
            assert not box.box.witnessing.alarms.all
        # And the receipt has them with itself, as any verifier finds.
        anna = made[0]
        receipt = await anna.http("GET", f"/v1/receipts/{answers[anna.node_id]['request_id']}")
        for other in made[1:]:
            assert f"pinaivu/witness/{other.node_id}" in receipt.text
        policy = LogPolicy(witnesses=tuple(other.node_id for other in made[1:]))
        assert [one for one in verify_receipt(receipt.content, log=policy) if not one.ok] == []


async def test_logs_grow_and_a_young_receipt_has_no_cosignature_yet(tmp_path: Path) -> None:
    async with boxes(tmp_path, "anna", "ben") as (anna, ben):
        last = ben.box.witnessing.witness.last
        for size in range(1, 5):
            answer = (await anna.chat()).json()
            path = f"/v1/log/proof/{answer['request_id']}"
            await anna.box.receipt_log.cover()
            young = entry_proof.read((await anna.http("GET", path)).text)
            assert checkpoint.witnesses_named(young.note) == []
            await anna.box.witnessing.round()
            await settled(anna, size)
            assert [one.size for one in last.values()] == [size]
            proof = entry_proof.read((await anna.http("GET", path)).text)
            assert checkpoint.witnesses_named(proof.note) == [ben.node_id]
        assert not ben.box.witnessing.alarms.all


async def settled(box: InProcessBox, size: int) -> None:
    """Its witnesses have cosigned that many entries."""
    cosigned = box.box.witnessing.cosigning.cosigned
    await wait_until(lambda: bool(cosigned) and {one.size for one in cosigned.values()} == {size})


async def test_members_do_it_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "ROUND_SECONDS", 0.05)
    async with boxes(tmp_path, "anna", "ben") as (anna, ben):
        await anna.chat()
        await wait_until(lambda: ben.node_id in anna.box.witnessing.cosigning.cosigned)
        await settled(anna, 1)


async def test_a_box_that_is_started_again_goes_on(tmp_path: Path) -> None:
    """Both: the witness knows what it cosigned, and the log asks from there."""
    net = MemoryNetwork()
    for size in (1, 2, 3):
        async with (
            in_process_box(net, tmp_path / "anna", (FAKE,)) as anna,
            in_process_box(net, tmp_path / "ben", (FAKE,)) as ben,
        ):
            if size == 1:
                await soon(ben.network.join(await anna.network.invite()))
            await all_connected(anna, ben)
            await anna.chat()
            await anna.box.receipt_log.cover()
            await anna.box.witnessing.round()
            await settled(anna, size)
            assert [one.size for one in ben.box.witnessing.witness.last.values()] == [size]
            assert not ben.box.witnessing.alarms.all


# -- witnesses that are not -----------------------------------------------------------------------


async def test_a_witness_that_lies_or_is_silent_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with with_liar(tmp_path, "anna", "ben") as ((anna, ben), liar):
        liar.respond = only_to(log_wire.Submit, log_wire.Declined(404, "nothing"))
        await write_receipts(anna, 1)
        await anna.box.witnessing.round()
        await wait_until(lambda: anna.box.witnessing.cosigning.cosigned.keys() == {ben.node_id})
        text = (await anna.box.receipt_log.checkpoint()).text
        lies = (
            checkpoint.cosign(liar.identity, text.replace("\n1\n", "\n2\n"), 1).line,
            checkpoint.cosign(known_identity(5), text, 1).line,
            "— nonsense\n",
            "",
            "\x1b[2J",
        )
        for lie in lies:
            liar.respond = only_to(log_wire.Submit, log_wire.Cosigned(lie))
            anna.box.witnessing.is_back(liar.identity.node_id)
            asked = count(liar, log_wire.Submit)
            await anna.box.witnessing.round()
            await wait_until(lambda: not anna.box.witnessing.cosigning._asked)
            assert count(liar, log_wire.Submit) == asked + 1
            await anna.box.witnessing.round()  # it is left alone for some time
            assert count(liar, log_wire.Submit) == asked + 1
        assert caplog.text.count("is not its cosignature") == len(lies)
        signed = await anna.box.receipt_log.checkpoint()
        assert checkpoint.witnesses_named(signed) == [ben.node_id]
        # One that says nothing at all: the others are asked all the same.
        liar.respond = only_to(log_wire.Submit, None)
        await write_receipts(anna, 2)
        anna.box.witnessing.is_back(liar.identity.node_id)
        await anna.box.witnessing.round()
        await wait_until(lambda: ben.box.witnessing.witness.last[signed_origin(signed)].size == 2)


def signed_origin(signed: note.Note) -> str:
    return checkpoint.read(signed).origin


def count(liar: LogPeer, kind: type[Question]) -> int:
    return sum(isinstance(question, kind) for question in liar.asked)


def only_to(kind: type[Question], answer: Answer | None) -> Callable[[str, Question], Any]:
    """Answers questions of that kind so, and no others."""

    def respond(_peer: str, question: Question) -> Answer | None:
        return answer if isinstance(question, kind) else log_wire.Declined(404, "nothing")

    return respond


async def write_receipts(box: InProcessBox, size: int) -> None:
    """Its log has so many entries afterwards, whoever would serve the requests."""
    signed = b'{"v":4,"number":%d}'
    for number in range(size):
        if await store.size(box.box.database, box.box.receipt_log.current) >= size:
            break
        await box.box.database.write(store.append(signed % number))
    await box.box.receipt_log.cover()


async def test_a_box_that_does_not_know_the_purpose_is_left_alone(tmp_path: Path) -> None:
    """Boxes of before have links and streams as ever."""
    async with with_liar(tmp_path, "anna") as ((anna,), old):
        del old.network.handlers[log_wire.PURPOSE]
        await write_receipts(anna, 1)
        await anna.box.witnessing.round()
        await anna.box.witnessing.round()
        assert connected(anna) == 1 and not anna.box.witnessing.cosigning.cosigned
        with pytest.raises(PeeringError):
            await old.network.open(known_identity(9).node_id, log_wire.PURPOSE)


# -- forks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(5, 9), (8, 13), (4, 4), (1, 6)])
async def test_a_log_that_was_regrown_is_evidence(tmp_path: Path, old: int, new: int) -> None:
    """A power of two too, where its own proof leaves a hash out: the witness asks for it."""
    async with with_liar(tmp_path, "anna") as ((anna,), liar):
        first = WrittenLog(liar.identity.signing_key).grow(old, "first")
        second = WrittenLog(liar.identity.signing_key).grow(new, "second")
        assert isinstance(await liar.submit(anna.node_id, first, 0), log_wire.Cosigned)
        liar.proves(second)
        assert isinstance(await liar.submit(anna.node_id, second, old), log_wire.Declined)
        (alarm,) = await alarms(anna, "fork")
        assert all(step.ok for step in evidence.verify(alarm.document))
        # What was cosigned stays, and nothing is asked of it any more.
        assert anna.box.witnessing.witness.last[first.origin].size == old
        shown = (await anna.http("GET", "/v1/admin/peers/liar")).json()
        assert shown["reputation"]["value"] == 0 and "two histories" in shown["reputation"]["why"]
        assert [each["kind"] for each in shown["log_alarms"]] == ["fork"]
        assert "pinaivu_log_forks_total 1.0" in (await anna.http("GET", "/metrics")).text
        assert "two histories" in await anna.page("/admin/peers")
        _verified_by_others(tmp_path, alarm)


def _verified_by_others(folder: Path, alarm: Any) -> None:
    """By another process without a home, from the file alone; and not once it is changed."""
    file = folder / "evidence.json"
    file.write_bytes(alarm.document)
    command = [sys.executable, "-m", "pinaivu_box", "receipts", "evidence", str(file)]
    home = ["--home", str(folder / "nowhere")]
    done = subprocess.run([*command, *home], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "4. ok     fork: " in done.stdout
    text = alarm.document.decode()
    file.write_text(text.replace('"checkpoints"', '"checkpoint"'))
    dismissed = ("receipts", "evidence", str(file), "--dismiss")
    assert run_command(*dismissed, home=folder / "nowhere", check=False).returncode == 2
    refused = run_command("receipts", "evidence", str(file), home=folder / "nowhere", check=False)
    assert refused.returncode == 1 and "1. FAILED form: " in refused.stdout


async def test_a_box_that_forked_its_log_is_asked_for_nothing(tmp_path: Path) -> None:
    """Until the operator says that it no longer counts."""
    async with with_liar(tmp_path, "anna") as ((anna,), liar):
        key = liar.identity.signing_key
        liar.offers("ab" * 32)
        await wait_until(lambda: count_offers(anna) == 1)
        await liar.submit(anna.node_id, WrittenLog(key, seed="one").grow(4), 0)
        await liar.submit(anna.node_id, WrittenLog(key, seed="two").grow(4), 4)
        (alarm,) = await alarms(anna, "fork")
        asked = list[str]()

        async def serve(peer: str, stream: Stream) -> None:
            asked.append(peer)
            stream.abandon()

        liar.handler = serve
        refused = await anna.chat()
        assert refused.status_code == 503 and not asked
        assert "two histories" in refused.text
        await witnessed.dismiss(anna.box.database, alarm.origin)
        await anna.box.witnessing.alarms.open()
        await anna.chat()
        assert asked


async def test_members_that_were_shown_two_histories_find_out(tmp_path: Path) -> None:
    """Each of them saw a log that only grew."""
    async with with_liar(tmp_path, "anna", "ben") as ((anna, ben), liar):
        key = liar.identity.signing_key
        for_anna = WrittenLog(key).grow(3, "same").grow(6, "for anna")
        for_ben = WrittenLog(key).grow(3, "same").grow(9, "for ben")
        await liar.submit(anna.node_id, for_anna, 0, 3)
        await liar.submit(ben.node_id, for_ben, 0, 3)
        assert isinstance(await liar.submit(anna.node_id, for_anna, 3), log_wire.Cosigned)
        assert isinstance(await liar.submit(ben.node_id, for_ben, 3), log_wire.Cosigned)
        liar.proves(for_ben)
        for box in (anna, ben, anna, ben):
            await compare(box, liar)
        for box in (anna, ben):
            (alarm,) = await alarms(box, "fork")
            assert alarm.node_id == liar.identity.node_id


async def compare(box: InProcessBox, liar: LogPeer) -> None:
    """A round of a box, with the other box and not with the liar."""
    witnessing = box.box.witnessing
    assert witnessing.comparison is not None and witnessing._questions is not None
    others = {one.node_id for one in box.network.peers() if one.node_id != liar.identity.node_id}
    await witnessing._compare(witnessing._questions, witnessing.comparison, others)


async def test_two_histories_are_found_out_where_nobody_cosigned(tmp_path: Path) -> None:
    """In a large network most members witness others' logs."""
    async with with_liar(tmp_path, "anna") as ((anna,), liar):
        key = liar.identity.signing_key
        one, two = (WrittenLog(key, seed=seed).grow(6) for seed in ("one", "two"))
        for text in (one.note(5), one.note(), one.note(), two.note(3), one.note(2)):
            compared = await liar.ask(anna.node_id, log_wire.Compare((text,)))
        assert compared.notes == (one.note(),)  # the newest that it has seen
        assert not anna.box.witnessing.alarms.all
        await liar.ask(anna.node_id, log_wire.Compare((two.note(),)))
        (alarm,) = await alarms(anna, "fork")
        assert alarm.node_id == liar.identity.node_id
        known = await liar.ask(anna.node_id, log_wire.AskKnown(liar.identity.node_id))
        assert known.notes == (one.note(),)


async def test_a_member_with_many_logs_crowds_out_nobody_else(tmp_path: Path) -> None:
    async with with_liar(tmp_path, "anna") as ((anna,), liar):
        logs = [WrittenLog(liar.identity.signing_key, epoch=at).grow(1) for at in range(1, 61)]
        notes = tuple(log.note() for log in logs)
        for part in (notes[:30], notes[30:]):
            await liar.ask(anna.node_id, log_wire.Compare(part))
        known = await liar.ask(anna.node_id, log_wire.AskKnown(liar.identity.node_id))
        assert known.notes == notes[-MAX_LOGS_PER_BOX:]
        comparison = anna.box.witnessing.comparison
        assert comparison is not None and len(comparison.summary().notes) == MAX_LOGS_PER_BOX


async def test_evidence_spreads_to_members_that_saw_nothing(tmp_path: Path) -> None:
    async with with_liar(tmp_path, "anna", "ben") as ((anna, ben), liar):
        key = liar.identity.signing_key
        await liar.submit(anna.node_id, WrittenLog(key, seed="one").grow(4), 0)
        await liar.submit(anna.node_id, WrittenLog(key, seed="two").grow(4), 4)
        await alarms(anna, "fork")
        assert not ben.box.witnessing.alarms.all
        await compare(anna, liar)
        (alarm,) = await alarms(ben, "fork")
        assert alarm.document == next(iter(anna.box.witnessing.alarms.all.values())).document


async def test_a_log_that_proves_nothing_is_told_and_is_no_fork(tmp_path: Path) -> None:
    """Nobody else could verify it."""
    async with with_liar(tmp_path, "anna", "ben") as ((anna, ben), liar):
        key = liar.identity.signing_key
        await liar.submit(anna.node_id, WrittenLog(key, seed="one").grow(5), 0)
        await liar.submit(ben.node_id, WrittenLog(key, seed="two").grow(9), 0)
        nonsense = log_wire.Consistency(bytes(32), (bytes(32),) * 3)
        liar.respond = only_to(log_wire.AskConsistency, nonsense)
        await compare(anna, liar)
        (alarm,) = await alarms(anna, "unproven")
        assert not alarm.document and not anna.box.witnessing.alarms.forked(alarm.node_id)
        shown = (await anna.http("GET", "/v1/admin/peers/liar")).json()
        assert shown["reputation"]["value"] == 1


async def test_a_log_that_is_away_is_asked_again(tmp_path: Path) -> None:
    async with with_liar(tmp_path, "anna", "ben") as ((anna, ben), liar):
        log = WrittenLog(liar.identity.signing_key).grow(9)
        await liar.submit(anna.node_id, log, 0, 5)
        await liar.submit(ben.node_id, log, 0)
        liar.respond = lambda _peer, _question: log_wire.Thanks()  # nonsense
        await compare(anna, liar)
        comparison = anna.box.witnessing.comparison
        assert comparison is not None
        await wait_until(lambda: bool(liar.asked))
        assert comparison._waiting and not anna.box.witnessing.alarms.all
        liar.proves(log)
        anna.box.witnessing.is_back(liar.identity.node_id)
        comparison.ask_again()
        await wait_until(lambda: not comparison._waiting)
        assert not anna.box.witnessing.alarms.all


async def test_what_a_member_makes_up_is_not_believed(tmp_path: Path) -> None:
    """About itself it could say anything; about others nothing without their signatures."""
    async with with_liar(tmp_path, "anna", "ben") as ((anna, ben), liar):
        await write_receipts(ben, 3)
        await ben.box.witnessing.round()
        await settled(ben, 3)
        known = anna.box.witnessing.witness.last
        (kept,) = known.values()
        forged = kept.note.replace("\n3\n", "\n4\n")
        other = WrittenLog(liar.identity.signing_key, seed="x").grow(3)
        other.origin = kept.origin
        strange = WrittenLog(known_identity(99).signing_key).grow(3)
        notes = (forged, other.note(), strange.note(), "", "\x00" * 50, kept.note * 2)
        documents = (b"", b"{}", b"\xff" * 100, b"[" * 5000)
        compared = await liar.ask(anna.node_id, log_wire.Compare(notes, ("x" * 32,)))
        assert isinstance(compared, log_wire.Compared) and compared.wanted == ("x" * 32,)
        await liar.questions.ask(anna.node_id, log_wire.GiveEvidence(documents), log_wire.Thanks)
        strangers = evidence.fork(
            note.read(strange.note()),
            note.read(WrittenLog(known_identity(99).signing_key, seed="y").grow(3).note()),
        )
        assert strangers is not None
        give = log_wire.GiveEvidence((strangers.document,))
        await liar.questions.ask(anna.node_id, give, log_wire.Thanks)
        assert not anna.box.witnessing.alarms.all and list(known.values()) == [kept]
        assert isinstance(
            await liar.ask(anna.node_id, log_wire.Submit(3, (), kept.note)), log_wire.Declined
        )
        assert connected(anna) == 2


async def test_a_member_that_asks_without_end_is_told_to_wait(tmp_path: Path) -> None:
    async with with_liar(tmp_path, "anna") as ((anna,), liar):
        answers = [await liar.ask(anna.node_id, log_wire.Compare()) for _ in range(120)]
        declined = [one for one in answers if isinstance(one, log_wire.Declined)]
        assert declined and {one.status for one in declined} == {429}


# -- restarts -------------------------------------------------------------------------------------


async def test_a_database_that_was_set_back_is_a_restart_and_no_fork(tmp_path: Path) -> None:
    """Its own home forgets: the witness tells it, and it begins another log, with a statement."""
    net = MemoryNetwork()
    async with in_process_box(net, tmp_path / "ben", (FAKE,)) as ben:
        async with in_process_box(net, tmp_path / "anna", (FAKE,)) as anna:
            await soon(anna.network.join(await ben.network.invite()))
            await all_connected(anna, ben)
            await write_receipts(anna, 2)
            anna_id, origin = anna.node_id, anna.box.receipt_log.origin
        home = tmp_path / "anna"
        copy = (home / "pinaivu.db").read_bytes()
        async with in_process_box(net, home, (FAKE,)) as anna:
            await all_connected(anna, ben)
            await write_receipts(anna, 5)
            await anna.box.witnessing.round()
            await settled(anna, 5)
        for name in ("pinaivu.db-wal", "pinaivu.db-shm", "log.checkpoint"):
            (home / name).unlink(missing_ok=True)
        (home / "pinaivu.db").write_bytes(copy)
        async with in_process_box(net, home, (FAKE,)) as anna:
            await all_connected(anna, ben)
            assert (anna.node_id, anna.box.receipt_log.origin) == (anna_id, origin)
            await write_receipts(anna, 3)
            await anna.box.witnessing.round()
            assert anna.box.receipt_log.origin != origin
            await write_receipts(anna, 4)
            await anna.box.witnessing.round()
            known = ben.box.witnessing.witness
            await wait_until(lambda: len(known.logs_of(anna_id)) == 2)
            assert not ben.box.witnessing.alarms.forked(anna_id)
            stated = msgspec.json.decode(known.logs_of(anna_id)[-1].restart)
            assert "\\n5\\n" in stated["signed"] and origin in stated["signed"]


async def test_a_log_that_has_ended_still_proves_what_it_was(tmp_path: Path) -> None:
    async with with_liar(tmp_path, "anna") as ((anna,), asker):
        log = anna.box.receipt_log
        notes = {}
        for size in (4, 7):
            await write_receipts(anna, size)
            signed = await log.checkpoint()
            notes[size] = checkpoint.read(signed)
        await log.histories.begin("A test has ended it.", None)
        await write_receipts(anna, 3)
        origin = notes[4].origin
        assert log.origin != origin
        ask = log_wire.AskConsistency(origin, 4, 7)
        proven = await soon(asker.questions.ask(anna.node_id, ask, log_wire.Consistency))
        assert isinstance(proven, log_wire.Consistency) and proven.root == notes[4].root
        assert is_consistent(4, notes[4].root, 7, notes[7].root, proven.proof)
        # What it never had belongs to the next one: no proof, and what it has stated instead.
        for question in (
            log_wire.AskConsistency(origin, 4, 9),
            log_wire.AskConsistency(origin, 0, 4),
            log_wire.AskConsistency(origin, 7, 4),
            log_wire.AskConsistency("elsewhere", 1, 2),
        ):
            refused = await soon(asker.questions.ask(anna.node_id, question, log_wire.Consistency))
            assert isinstance(refused, log_wire.Declined)
            assert origin.encode() in refused.restart


async def test_a_disk_that_was_lost_is_a_restart_and_no_fork(tmp_path: Path) -> None:
    """Nothing is left but the key: members say what the box has signed."""
    net, home = MemoryNetwork(), tmp_path / "anna"
    async with in_process_box(net, tmp_path / "ben", (FAKE,)) as ben:
        async with in_process_box(net, home, (FAKE,)) as anna:
            await soon(anna.network.join(await ben.network.invite()))
            await all_connected(anna, ben)
            await write_receipts(anna, 4)
            await anna.box.witnessing.round()
            await settled(anna, 4)
            before = await anna.box.receipt_log.checkpoint()
        key = (home / "identity.key").read_text()
        shutil.rmtree(home)
        home.mkdir(mode=0o700)
        (home / "identity.key").write_text(key)
        (home / "identity.key").chmod(0o600)
        async with in_process_box(net, home, (FAKE,)) as anna:
            await soon(anna.network.join(await ben.network.invite()))
            await all_connected(anna, ben)
            assert anna.box.receipt_log.origin != signed_origin(before)
            await write_receipts(anna, 2)
            await anna.box.witnessing.round()
            await settled(anna, 2)
            assert ben.box.witnessing.alarms.all == {}
            last = ben.box.witnessing.witness.logs_of(anna.node_id)
            assert [one.size for one in last] == [4, 2]
            assert signed_origin(before).encode() in last[-1].restart


async def test_a_database_that_was_truncated_and_regrown_is_caught(tmp_path: Path) -> None:
    """By somebody who has the machine, removes all that the box would notice itself, and keeps it
    from asking."""
    net = MemoryNetwork()
    async with in_process_box(net, tmp_path / "ben", (FAKE,)) as ben:
        home = tmp_path / "anna"
        async with in_process_box(net, home, (FAKE,)) as anna:
            await soon(anna.network.join(await ben.network.invite()))
            await all_connected(anna, ben)
            await write_receipts(anna, 6)
            await anna.box.witnessing.round()
            await settled(anna, 6)
        _truncate(home, 3)
        async with in_process_box(net, home, (FAKE,)) as anna:
            await all_connected(anna, ben)
            anna.box.witnessing._told.add(ben.node_id)
            await _regrow(anna, 9)
            await anna.box.witnessing.round()
            (alarm,) = await alarms(ben, "fork")
            assert alarm.node_id == anna.node_id
            _verified_by_others(tmp_path, alarm)


def _truncate(home: Path, size: int) -> None:
    with contextlib.closing(sqlite3.connect(home / "pinaivu.db")) as database, database:
        database.executescript(
            "DROP TRIGGER log_entries_are_not_deleted; DELETE FROM log_checkpoints;"
            f"DELETE FROM log_entries WHERE id > {size};"
            f"UPDATE sqlite_sequence SET seq = {size} WHERE name = 'log_entries'"
        )
    (home / "log.checkpoint").unlink()


async def _regrow(box: InProcessBox, size: int) -> None:
    for number in range(20):
        if await store.size(box.box.database, box.box.receipt_log.current) < size:
            await box.box.database.write(store.append(b"other %d" % number))
    await box.box.receipt_log.cover()
