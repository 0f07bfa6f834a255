"""Who belongs to the network: certificates and revocations, and the one verdict that they lead to.

A roster is two sets that only grow, so merging is a union: order, repetition and loss do not
matter, and whoever holds the same records says the same of everybody.  No clock decides anything:
`issued_at` is what the signer's clock said, and is only shown.

Who may do what:

- The founder (its key is in the network's id) is the root.  It cannot be revoked.
- An admin may invite anybody, admins too, and revoke anybody but the founder.
- Another member may invite, if an admin invited it, and revoke whom it invited.  Those whom it
  invites may not invite: so one hostile member brings in `MAX_INVITED` strangers and no more.

A revocation is of the box and not of one certificate: other members' certificates, old or new, do
not bring it back.  It holds for ever, also after its signer was revoked; else revoking somebody
could let others back in.  What that costs: an admin whose key was stolen can revoke many.  The
cure is the founder, who alone can readmit (a certificate of a higher `epoch`, void only by the
founder's word).

Whoever was certified only by a revoked box falls with it: a stolen key could have certified
anybody and dated it back.  `orphans` says who they are, so that the revoker can certify those it
knows anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from pinaivu_box.identity import Identity
from pinaivu_box.membership.records import (
    MAX_COUNTER,
    Certificate,
    Invalid,
    Record,
    Revocation,
    Statement,
    founder_of,
    hashed,
    key_of,
    network_key,
    node_of,
    read,
    record_id,
    seal,
    signer_of,
)

MAX_INVITED = 32  # by one member that is no admin; as many revocations
MAX_BY_ADMIN = 4096
MAX_RECORDS = 16384
BUCKETS = 64
MAX_PROOF = 64  # certificates that show one member
_ADMIN, _LAST = 0, 2  # levels: admins, those they invited, those whom these invited
_CLOCK_TOLERANCE_MS = 300_000


Reader = Callable[[Record], Statement]
Check = Callable[[Certificate], bool]


class Verdict(NamedTuple):
    """`why` is a sentence for operators; `name` is what its inviter calls the box."""

    ok: bool
    why: str
    name: str = ""
    admin: bool = False


class RosterUpdate(NamedTuple):
    """`waiting`: their signer is not known (yet), they were not kept.  `refused`: with the reason;
    `forged` are those that no honest member passes on."""

    new: list[Record]
    waiting: list[Record]
    refused: list[tuple[Record, str]]
    forged: list[tuple[Record, str]]


class Roster:
    def __init__(self, network: str) -> None:
        self.network = network
        self.founder = founder_of(network)
        self.version = 0  # grows with every change
        self.network_key = network_key(network)
        self._records: dict[bytes, Record] = {}
        self._certificates: dict[str, list[Certificate]] = defaultdict(list)  # by node
        self._numbers: dict[Certificate, bytes] = {}
        self._issued: dict[str, list[Certificate]] = defaultdict(list)  # by inviter
        self._revocations: dict[str, list[Revocation]] = defaultdict(list)  # by node
        self._revoked: dict[str, int] = defaultdict(int)  # revocations by signer
        self._ever: dict[str, int] | None = None  # levels, whatever was revoked
        self._now: dict[str, int] | None = None  # levels of who is a member
        self._buckets: list[bytes] | None = None

    def __contains__(self, record_id: bytes) -> bool:
        return record_id in self._records

    def __len__(self) -> int:
        return len(self._records)

    def get(self, record_id: bytes) -> Record | None:
        return self._records.get(record_id)

    def records(self) -> list[Record]:
        return list(self._records.values())

    # Growing

    def admit(self, records: Iterable[Record], read_record: Reader = read) -> RosterUpdate:
        """Keep those that a member signed; they may come in any order."""
        done = RosterUpdate([], [], [], [])
        pending: dict[bytes, tuple[Record, Statement]] = {}
        for record in records:
            try:
                statement = read_record(record)
                if statement.network != self.network_key:
                    raise Invalid("a record of another network")
            except Invalid as error:
                done.forged.append((record, str(error)))
                continue
            if (number := record_id(record)) not in self._records:
                pending[number] = (record, statement)
        before = -1
        while before != len(done.new):  # one may make another's signer known
            before = len(done.new)
            for number, (record, statement) in list(pending.items()):
                full = len(self._records) >= MAX_RECORDS and signer_of(statement) != self.founder
                if self._room(statement) and not full:  # the founder can always put somebody out
                    del pending[number]
                    self._keep(number, record, statement)
                    done.new.append(record)
        for record, statement in pending.values():
            if signer_of(statement) in self._ever_levels():
                done.refused.append((record, "its signer has signed as much as it may"))
            else:
                done.waiting.append(record)
        return done

    def merge(self, other: Roster) -> None:
        """Both must be of one network.  Commutative, associative and idempotent."""
        self.admit(other.records())

    def _room(self, statement: Statement) -> bool:
        """Whether its signer is known and may still sign so many.

        Nothing is ever dropped to make room: that would let a signer undo its own revocations.
        """
        signer = signer_of(statement)
        level = self._ever_levels().get(signer, _LAST)
        most = MAX_BY_ADMIN if level == _ADMIN else MAX_INVITED if level < _LAST else 0
        if isinstance(statement, Certificate):
            return len(self._issued[signer]) < most
        return self._revoked[signer] < most

    def _keep(self, number: bytes, record: Record, statement: Statement) -> None:
        self._records[number] = record
        node = node_of(statement.node)
        if isinstance(statement, Certificate):
            self._certificates[node].append(statement)
            self._numbers[statement] = number
            self._issued[node_of(statement.inviter)].append(statement)
            self._ever = None
        else:
            self._revocations[node].append(statement)
            self._revoked[node_of(statement.signer)] += 1
        self._now = self._buckets = None
        self.version += 1

    # Verdicts

    def members(self) -> dict[str, int]:
        """Everybody who belongs, and how far from the admins (0: is one)."""
        if self._now is None:
            self._now = self._levels(lambda one: not self._void(one))
        return self._now

    def member(self, node_id: str, at: float | None = None) -> Verdict:
        """`at`, Unix seconds, is only for saying whose clock is off."""
        if node_id == self.founder:
            return Verdict(True, "it founded the network", self._name(node_id), True)
        level = self.members().get(node_id)
        if level is None:
            return Verdict(False, self._why_not(node_id), self._name(node_id))
        latest = self.certificate(node_id)
        assert latest is not None  # nobody else is a member without one
        why = f"{self._called(node_of(latest.inviter))} invited it"
        ahead = 0 if at is None else latest.issued_at - round(at * 1000)
        if ahead > _CLOCK_TOLERANCE_MS:
            why += f" (as its certificate says, {ahead // 1000} s from now: a clock is off)"
        return Verdict(True, why, latest.name, level == _ADMIN)

    def known(self) -> list[str]:
        """Everybody whom somebody ever certified, and the founder."""
        return list(dict.fromkeys([self.founder, *self._certificates]))

    def revoked(self, node_id: str) -> bool:
        return node_id not in self.members() and bool(self._counting(node_id))

    def orphans(self, node_id: str) -> dict[str, str]:
        """Node ids and names of those who fall if that box is revoked."""
        key = key_of(node_id)
        without = self._levels(
            lambda one: key not in (one.node, one.inviter) and not self._void(one)
        )
        return {
            node: self._name(node)
            for node in self.members()
            if node not in without and node != node_id
        }

    def proof(self, node_id: str) -> list[Record]:
        """Certificates that lead from the founder to a member: enough to be let in with."""
        members, found = self.members(), []
        wanted, done = [node_id], {self.founder}
        while wanted:
            if (node := wanted.pop()) in done:
                continue
            done.add(node)
            for one in self._certificates.get(node, ()):
                inviter = node_of(one.inviter)
                if inviter in members and not self._void(one):
                    found.append(self._records[self._numbers[one]])
                    wanted.append(inviter)
        return found[:MAX_PROOF]

    def _why_not(self, node_id: str) -> str:
        for revocation in self._counting(node_id):
            reason = f" ({revocation.reason})" if revocation.reason else ""
            return f"{self._called(node_of(revocation.signer))} revoked it{reason}"
        for certificate in self._certificates.get(node_id, ()):
            inviter = node_of(certificate.inviter)
            if inviter not in self.members():
                return f"it was invited by {self._called(inviter)}, who is no member any more"
            return f"it was invited by {self._called(inviter)}, who may not do that"
        return "no member has certified it"

    def _name(self, node_id: str) -> str:
        latest = self.certificate(node_id)
        return latest.name if latest else ""

    def _called(self, node_id: str) -> str:
        return self._name(node_id) or node_id[:13]

    def certificate(self, node_id: str) -> Certificate | None:
        """The one that names the box."""
        found = self._certificates.get(node_id, ())
        members = self.members()

        def rank(one: Certificate) -> tuple[bool, int, int, bytes, str]:
            level = members.get(node_of(one.inviter), _LAST)  # an admin's name counts more
            return not self._void(one), -level, one.serial, one.inviter, one.name

        return max(found, key=rank, default=None)

    def _ever_levels(self) -> dict[str, int]:
        if self._ever is None:
            self._ever = self._levels(lambda one: True)
        return self._ever

    def _levels(self, counts: Check) -> dict[str, int]:
        """Whom the certificates that count lead to from the founder, admins first."""
        levels = {self.founder: _ADMIN}
        edge = [self.founder]
        while edge:
            found = {node_of(one.node) for one in self._from(edge, counts) if one.admin}
            edge = [node for node in found if node not in levels]
            levels.update(dict.fromkeys(edge, _ADMIN))
        edge = list(levels)
        for level in range(1, _LAST + 1):
            found = {node_of(one.node) for one in self._from(edge, counts) if not one.admin}
            edge = [node for node in found if node not in levels]
            levels.update(dict.fromkeys(edge, level))
        return levels

    def _from(self, inviters: Iterable[str], counts: Check) -> Iterator[Certificate]:
        for inviter in inviters:
            for one in self._issued.get(inviter, ()):
                if (one.epoch == 0 or inviter == self.founder) and counts(one):
                    yield one

    def _counting(self, node_id: str) -> list[Revocation]:
        """The revocations of a box whose signers were ever entitled to them."""
        found = self._revocations.get(node_id)
        if not found or node_id == self.founder:
            return []
        ever = self._ever_levels()
        inviters = {one.inviter for one in self._certificates.get(node_id, ())}
        return [
            one
            for one in found
            if (level := ever.get(node_of(one.signer), _LAST)) == _ADMIN
            or (level < _LAST and one.signer in inviters)
        ]

    def _void(self, certificate: Certificate) -> bool:
        return any(
            certificate.epoch == 0
            or (node_of(one.signer) == self.founder and one.epoch >= certificate.epoch)
            for one in self._counting(node_of(certificate.node))
        )

    # Comparing

    def buckets(self) -> list[bytes]:
        """8 bytes for each part of the records, so that two rosters find where they differ."""
        if self._buckets is None:
            parts: list[list[bytes]] = [[] for _ in range(BUCKETS)]
            for number in sorted(self._records):
                parts[number[0] % BUCKETS].append(number)
            self._buckets = [hashed(*part, size=8) for part in parts]
        return self._buckets

    def digest(self) -> bytes:
        return hashed(*self.buckets(), size=16)

    def in_bucket(self, bucket: int) -> list[bytes]:
        return [number for number in self._records if number[0] % BUCKETS == bucket]

    # Signing

    def may_invite(self, node_id: str, *, admin: bool = False) -> str | None:
        """Why it may not, or None."""
        level = self.members().get(node_id, _LAST)
        if level == _LAST:
            return "this box may not invite: ask an admin of the network to do it"
        if admin and level != _ADMIN:
            return "only an admin of the network can invite an admin"
        return None

    def certify(
        self, identity: Identity, node_id: str, name: str, at: float, *, admin: bool = False
    ) -> Record:
        """A certificate of our own, admitted.  `at` in Unix seconds.  Raises ValueError in one
        sentence."""
        me = identity.node_id
        if (why := self.may_invite(me, admin=admin)) is not None:
            raise ValueError(why)
        epoch = self._epoch(node_id)
        if self.revoked(node_id):
            if me != self.founder:
                raise ValueError("that box was revoked: only the network's founder can readmit it")
            epoch += 1
        serial = 1 + max((one.serial for one in self._certificates.get(node_id, ())), default=0)
        serial = min(serial, MAX_COUNTER)
        return self._own(
            seal(
                identity,
                "member",
                Certificate(
                    self.network_key,
                    key_of(node_id),
                    key_of(me),
                    name,
                    round(at * 1000),
                    serial,
                    admin,
                    epoch if me == self.founder else 0,
                ),
            )
        )

    def revoke(self, identity: Identity, node_id: str, at: float, reason: str = "") -> Record:
        """A revocation of our own, admitted.  Raises ValueError in one sentence."""
        me = identity.node_id
        if node_id == self.founder:
            raise ValueError("the founder of the network cannot be revoked")
        invited = any(one.inviter == key_of(me) for one in self._certificates.get(node_id, ()))
        if self.members().get(me, _LAST) != _ADMIN and not invited:
            raise ValueError("only an admin, or whoever invited a box, can revoke it")
        epoch = self._epoch(node_id) if me == self.founder else 0
        return self._own(
            seal(
                identity,
                "revocation",
                Revocation(
                    self.network_key, key_of(node_id), key_of(me), round(at * 1000), reason, epoch
                ),
            )
        )

    def _epoch(self, node_id: str) -> int:
        """The last one that the founder gave the box; nobody else's count."""
        given = [
            one.epoch
            for one in self._certificates.get(node_id, ())
            if node_of(one.inviter) == self.founder
        ]
        return max(given, default=0)

    def _own(self, record: Record) -> Record:
        done = self.admit([record])
        for _, why in (*done.forged, *done.refused):
            raise ValueError(why)
        return record
