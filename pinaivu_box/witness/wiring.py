"""The witness of a box, and what has its own log witnessed, joined."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from random import Random

from pinaivu_box.errors import PeeringError
from pinaivu_box.identity import NODE_PREFIX, Identity
from pinaivu_box.log import checkpoint, note
from pinaivu_box.log.note import COSIGNATURE, ED25519, NoteError, NoteKey
from pinaivu_box.network.network import Network
from pinaivu_box.peering_config import WitnessConfig
from pinaivu_box.receipt_log.service import ReceiptLog
from pinaivu_box.store.database import Database
from pinaivu_box.tasks import TaskSet
from pinaivu_box.witness import selection
from pinaivu_box.witness import wire as log_wire
from pinaivu_box.witness.alarms import Alarms
from pinaivu_box.witness.comparison import LogComparison
from pinaivu_box.witness.cosigning import Ask, Cosigning
from pinaivu_box.witness.http import HttpWitnesses
from pinaivu_box.witness.peers import LogServer
from pinaivu_box.witness.questions import Questions
from pinaivu_box.witness.witness import Witness

ROUND_SECONDS = 10.0  # a log asks for cosignatures at most so often, and members compare
_KNOWN_SECONDS = 5.0  # for members to say what they know of this box's log

log = logging.getLogger("pinaivu.witness")


class Witnessing:
    """`open` first, then `join` if the box has peers; `keep` runs until it is cancelled."""

    def __init__(
        self,
        identity: Identity,
        database: Database,
        own_log: ReceiptLog,
        settings: Callable[[], WitnessConfig],
    ) -> None:
        self._node_id = identity.node_id
        self._own_log, self._settings = own_log, settings
        self.alarms = Alarms(database)
        self.witness = Witness(identity, database, self.alarms, self._key_of)
        self.cosigning = Cosigning(own_log)
        self._http = HttpWitnesses()
        self._network: Network | None = None
        self._questions: Questions | None = None
        self.comparison: LogComparison | None = None
        self._comparing = TaskSet()
        self._told: set[str] = set()  # who has said what it knows of this box's log
        self._random = Random()  # noqa: S311, it only spreads questions

    async def open(self) -> None:
        await self.alarms.open()
        await self.witness.open()

    def join(self, network: Network) -> None:
        """Witness the members' logs, and have them witness this box's."""
        self._network = network
        self._questions = questions = Questions(network, self._random)
        self.comparison = LogComparison(
            self._node_id, self.witness, self.alarms, questions, self._own_log, self._is_known
        )
        server = LogServer(self.witness, self.comparison, self._own_log)
        network.handlers[log_wire.PURPOSE] = server.serve

    def is_back(self, peer: str) -> None:
        """There is a link to that peer again."""
        if self._questions is not None:
            self._questions.is_back(peer)
        self.cosigning.ask_again(peer)

    async def close(self) -> None:
        await self._comparing.cancel()
        await self.cosigning.close()
        if self.comparison is not None:
            await self.comparison.close()
        await self._http.close()

    async def keep(self) -> None:
        """Until cancelled: have the log witnessed, and compare with members."""
        while True:
            await asyncio.sleep(ROUND_SECONDS * self._random.uniform(0.9, 1.1))
            try:
                await self.round()
            except Exception:
                log.exception("a round of the witnesses failed")

    async def round(self) -> None:
        """Once, without waiting for cosignatures or for what others have seen."""
        await self.alarms.open()  # commands may have dismissed some
        linked = self._linked()
        if self._questions is not None and linked:
            await self._ask_what_is_known(self._questions, linked - self._told)
        others = self._others()
        keys = {url: key for url, key in others.items() if key is not None}
        await self.cosigning.submit(self._witnesses(linked, others), keys)
        if self._questions is not None and self.comparison is not None and linked:
            self.comparison.ask_again()
            if not len(self._comparing):
                self._comparing.spawn(self._compare(self._questions, self.comparison, linked))

    def _others(self) -> dict[str, NoteKey | None]:
        """The URLs of witnesses outside of the network, with the keys of those that are no
        boxes."""
        found: dict[str, NoteKey | None] = {}
        for text in self._settings().urls:
            key, _, url = text.rpartition(" ")
            if not key:
                found[url] = None
            elif (read := _key(key, COSIGNATURE)) is not None:
                found[url] = read
        return found

    def _witnesses(
        self, linked: Collection[str], others: Mapping[str, NoteKey | None]
    ) -> dict[str, Ask]:
        """Who is to cosign the log of this box."""
        asks = {url: self._http.ask(url, is_box=key is None) for url, key in others.items()}
        members = self._members()
        if self._questions is not None and self._node_id in members:
            for member in selection.witnesses_of(self._node_id, members).union(linked):
                asks[member] = _ask_member(self._questions, member)
        return asks

    async def _ask_what_is_known(self, questions: Questions, members: Collection[str]) -> None:
        """A box that was set back, or has lost its disk, learns from members what it has signed,
        before it signs more."""

        async def ask(member: str) -> None:
            try:
                known = await questions.ask(
                    member, log_wire.AskKnown(self._node_id), log_wire.Known
                )
            except PeeringError as error:
                log.debug("a member did not say what it knows: %s", error.message)
                return
            self._told.add(member)
            if isinstance(known, log_wire.Known):
                found.extend(known.notes)

        found: list[str] = []
        tasks = [asyncio.create_task(ask(member)) for member in members]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_KNOWN_SECONDS)
            for task in late:
                task.cancel()
            self._told.update(members if late else ())  # else each round would wait for them
        if (last := _latest(found, self._node_id)) is not None:
            await self._own_log.seen_elsewhere(last)

    async def _compare(
        self, questions: Questions, comparison: LogComparison, linked: Collection[str]
    ) -> None:
        """With one member, drawn at random."""
        peer = self._random.choice(sorted(linked))
        try:
            compared = await questions.ask(peer, comparison.summary(), log_wire.Compared)
            if not isinstance(compared, log_wire.Compared):
                return
            await comparison.learn(compared.notes)
            await comparison.learn_evidence(compared.evidence)
            documents = self.alarms.documents()
            given = [documents[key] for key in compared.wanted if key in documents]
            if given:
                give = log_wire.GiveEvidence(tuple(given))
                await questions.ask(peer, give, log_wire.Thanks)
        except PeeringError as error:
            log.debug("a member did not compare: %s", error.message)
        except Exception:
            log.exception("what a member has seen could not be compared")

    # Who is who

    def _members(self) -> Collection[str]:
        roster = self._network.roster if self._network is not None else None
        return roster.members() if roster is not None else ()

    def _linked(self) -> set[str]:
        peers = self._network.peers() if self._network is not None else ()
        return {peer.node_id for peer in peers if peer.state == "connected"}

    def _is_known(self, node_id: str) -> bool:
        """Whether it is a member, or was one."""
        roster = self._network.roster if self._network is not None else None
        return roster is not None and node_id in roster.known()

    def _key_of(self, origin: str) -> NoteKey | None:
        """The key of a log that is witnessed here: a member's, or one of the configuration."""
        try:
            node_id = checkpoint.node_of(origin)
        except NoteError:
            node_id = ""
        configured = self._settings().logs
        if node_id == self._node_id:
            return None
        if node_id and (node_id in configured or node_id in self._members()):
            return checkpoint.log_key(origin)
        for text in configured:
            if not text.startswith(NODE_PREFIX) and text.startswith(f"{origin}+"):
                return _key(text, ED25519)
        return None


@lru_cache(256)  # so that the operator is told once
def _key(text: str, kind: int) -> NoteKey | None:
    try:
        return note.read_key(text, kind)
    except NoteError as error:
        log.warning("[witness]: the key %s is wrong: %s", text[:100], error)
        return None


def _ask_member(questions: Questions, member: str) -> Ask:
    async def ask(
        submit: log_wire.Submit,
    ) -> log_wire.Cosigned | log_wire.SizeConflict | log_wire.Declined:
        return await questions.ask(member, submit, (log_wire.Cosigned, log_wire.SizeConflict))

    return ask


def _latest(notes: Collection[str], node_id: str) -> note.Note | None:
    """The last checkpoint that the box has signed, of these."""
    found = []
    for text in notes:
        try:
            signed = note.read(text)
            seen = checkpoint.read(signed)
            if seen.node_id == node_id and checkpoint.is_signed(signed, seen):
                found.append((checkpoint.epoch_of(seen.origin), seen.size, signed))
        except NoteError:
            continue
    return max(found, key=lambda each: each[:2])[2] if found else None
