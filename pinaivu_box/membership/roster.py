"""Who is a member of the network: certificates and revocations, and the verdict about each box.

A roster is two sets that only grow, so merging is a union: order, repetition and loss do not
matter, and all boxes with the same records reach the same verdicts.  No clock decides anything:
`issued_at` is what the signer's clock showed, and is only displayed.

Permissions:

- The founder (its key is in the network's id) is the root.  It cannot be revoked.
- An admin may invite any box, also as an admin, and revoke any box but the founder.
- Another member may invite, if an admin invited it, and revoke those it invited.  These may not
  invite in turn: so one hostile member brings in `MAX_INVITED` boxes and no more.

A revocation is of the box and not of one certificate: certificates of other members, old or new,
do not bring it back.  It is permanent, and stays valid after its signer was revoked; else revoking
one box could let others back in.  The price: an admin whose key was stolen can revoke many.  The
remedy is the founder, who alone can readmit (by a certificate of a higher `epoch`, which only the
founder can void).

A box that was certified only by a revoked box is not a member any more: a stolen key could have
certified any box and backdated it.  `orphans` names those boxes, so that the revoker can certify
the ones that it knows anew.
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
    RosterContent,
    key_of,
    network_key,
    node_of,
    read,
    record_id,
    seal,
    signer_of,
    truncated_hash,
)

MAX_INVITED = 32  # certificates of a member that is not an admin; as many revocations
MAX_BY_ADMIN = 4096  # the same of an admin
MAX_RECORDS = 16384
BUCKETS = 64
MAX_PROOF = 64  # certificates that prove one membership
_ADMIN, _LAST = 0, 2  # levels: admins, those they invited, those whom these invited
_CLOCK_TOLERANCE_MS = 300_000

Check = Callable[[Certificate], bool]


class Verdict(NamedTuple):
    """`why` is a sentence for operators; `name` is what its inviter calls the box."""

    ok: bool
    why: str
    name: str = ""
    admin: bool = False


class RosterUpdate(NamedTuple):
    """What became of records: `new` ones are kept, those whose signer is not known (yet) are not,
    nor, with the reasons, those `refused` and `forged` ones, that no honest member passes on."""

    new: list[Record]
    refused: list[str]
    forged: list[str]


class Roster:
    """The records of one network."""

    def __init__(self, network: str) -> None:
        self.network = network
        self.network_key = network_key(network)
        self.founder = node_of(self.network_key[:32])
        self._records: dict[bytes, Record] = {}
        self._certificates: dict[str, list[Certificate]] = defaultdict(list)  # by node
        self._ids: dict[Certificate, bytes] = {}
        self._issued: dict[str, list[Certificate]] = defaultdict(list)  # by inviter
        self._revocations: dict[str, list[Revocation]] = defaultdict(list)  # by node
        self._revocation_count: dict[str, int] = defaultdict(int)  # by signer
        self._levels_ever: dict[str, int] | None = None  # whatever was revoked
        self._levels_now: dict[str, int] | None = None  # of the members
        self._buckets: list[bytes] | None = None

    def __contains__(self, record_id: bytes) -> bool:
        return record_id in self._records

    def __len__(self) -> int:
        return len(self._records)

    def get(self, record_id: bytes) -> Record | None:
        return self._records.get(record_id)

    def records(self) -> list[Record]:
        return list(self._records.values())

    # Admitting records

    def admit(self, records: Iterable[Record]) -> RosterUpdate:
        """Keep the records that a member has signed; they may come in any order."""
        update = RosterUpdate([], [], [])
        pending: dict[bytes, tuple[Record, RosterContent]] = {}
        for record in records:
            try:
                content = read(record)
                if content.network != self.network_key:
                    raise Invalid("a record of another network")
            except Invalid as error:
                update.forged.append(str(error))
                continue
            if (key := record_id(record)) not in self._records:
                pending[key] = (record, content)
        before = -1
        while before != len(update.new):  # one may make another's signer known
            before = len(update.new)
            for key, (record, content) in list(pending.items()):
                full = len(self._records) >= MAX_RECORDS and signer_of(content) != self.founder
                if self._has_room(content) and not full:  # the founder can always revoke a box
                    del pending[key]
                    self._keep(key, record, content)
                    update.new.append(record)
        for _, content in pending.values():
            if signer_of(content) in self._ever_levels():
                update.refused.append("its signer has signed as much as it may")
        return update

    def _has_room(self, content: RosterContent) -> bool:
        """Whether its signer is known and may sign one more.

        Nothing is ever dropped to make room: that would let a signer undo its own revocations.
        """
        signer = signer_of(content)
        level = self._ever_levels().get(signer, _LAST)
        limit = MAX_BY_ADMIN if level == _ADMIN else MAX_INVITED if level < _LAST else 0
        if isinstance(content, Certificate):
            return len(self._issued[signer]) < limit
        return self._revocation_count[signer] < limit

    def _keep(self, key: bytes, record: Record, content: RosterContent) -> None:
        self._records[key] = record
        node = node_of(content.node)
        if isinstance(content, Certificate):
            self._certificates[node].append(content)
            self._ids[content] = key
            self._issued[node_of(content.inviter)].append(content)
            self._levels_ever = None
        else:
            self._revocations[node].append(content)
            self._revocation_count[node_of(content.signer)] += 1
        self._levels_now = self._buckets = None

    # Verdicts

    def members(self) -> dict[str, int]:
        """Return the node ids of all members and how far each is from the admins (0: it is one)."""
        if self._levels_now is None:
            self._levels_now = self._compute_levels(self._is_valid)
        return self._levels_now

    def member(self, node_id: str, at: float | None = None) -> Verdict:
        """Return whether a box is a member, and why.  `at` (Unix seconds) serves to say whose clock
        is wrong."""
        if node_id == self.founder:
            return Verdict(True, "it founded the network", self._name(node_id), True)
        level = self.members().get(node_id)
        if level is None:
            return Verdict(False, self._why_not(node_id), self._name(node_id))
        latest = self.certificate(node_id)
        assert latest is not None  # nobody else is a member without one
        why = f"{self._display_name(node_of(latest.inviter))} invited it"
        ahead = 0 if at is None else latest.issued_at - round(at * 1000)
        if ahead > _CLOCK_TOLERANCE_MS:
            why += f" (as its certificate says, {ahead // 1000} s from now: a clock is wrong)"
        return Verdict(True, why, latest.name, level == _ADMIN)

    def known(self) -> list[str]:
        """Return the node ids of all who were ever certified, and of the founder."""
        return list(dict.fromkeys([self.founder, *self._certificates]))

    def revoked(self, node_id: str) -> bool:
        """Whether a revocation keeps the box out."""
        return node_id not in self.members() and bool(self._valid_revocations(node_id))

    def orphans(self, node_id: str) -> dict[str, str]:
        """Return node ids and names of those who are no members any more if that box is revoked."""
        key = key_of(node_id)
        without = self._compute_levels(
            lambda cert: key not in (cert.node, cert.inviter) and self._is_valid(cert)
        )
        return {
            node: self._name(node)
            for node in self.members()
            if node not in without and node != node_id
        }

    def proof(self, node_id: str) -> list[Record]:
        """Return the certificates that lead from the founder to a member and prove that it is."""
        members, chain = self.members(), []
        pending, visited = [node_id], {self.founder}
        while pending:
            if (node := pending.pop()) in visited:
                continue
            visited.add(node)
            for certificate in self._certificates.get(node, ()):
                inviter = node_of(certificate.inviter)
                if inviter in members and self._is_valid(certificate):
                    chain.append(self._records[self._ids[certificate]])
                    pending.append(inviter)
        return chain[:MAX_PROOF]

    def _why_not(self, node_id: str) -> str:
        for revocation in self._valid_revocations(node_id):
            reason = f" ({revocation.reason})" if revocation.reason else ""
            return f"{self._display_name(node_of(revocation.signer))} revoked it{reason}"
        for certificate in self._certificates.get(node_id, ()):
            inviter = node_of(certificate.inviter)
            if inviter not in self.members():
                return f"{self._display_name(inviter)}, which invited it, is not a member any more"
            return f"{self._display_name(inviter)} invited it, and may not"
        return "no member has certified it"

    def _name(self, node_id: str) -> str:
        latest = self.certificate(node_id)
        return latest.name if latest else ""

    def _display_name(self, node_id: str) -> str:
        return self._name(node_id) or node_id[:13]

    def certificate(self, node_id: str) -> Certificate | None:
        """Return the certificate that names the box, None if it has none."""
        members = self.members()

        def rank(certificate: Certificate) -> tuple[bool, int, int, bytes, str]:
            inviter = certificate.inviter
            level = members.get(node_of(inviter), _LAST)  # an admin's name counts more
            valid = self._is_valid(certificate)
            return valid, -level, certificate.serial, inviter, certificate.name

        return max(self._certificates.get(node_id, ()), key=rank, default=None)

    def _ever_levels(self) -> dict[str, int]:
        if self._levels_ever is None:
            self._levels_ever = self._compute_levels(lambda certificate: True)
        return self._levels_ever

    def _compute_levels(self, counts: Check) -> dict[str, int]:
        """Return the level of each box that the certificates that count lead to from the founder,
        admins first."""
        levels = {self.founder: _ADMIN}
        edge = [self.founder]
        while edge:
            invited = {node_of(cert.node) for cert in self._issued_by(edge, counts) if cert.admin}
            edge = [node for node in invited if node not in levels]
            levels.update(dict.fromkeys(edge, _ADMIN))
        edge = list(levels)
        for level in range(1, _LAST + 1):
            invited = {
                node_of(cert.node) for cert in self._issued_by(edge, counts) if not cert.admin
            }
            edge = [node for node in invited if node not in levels]
            levels.update(dict.fromkeys(edge, level))
        return levels

    def _issued_by(self, inviters: Iterable[str], counts: Check) -> Iterator[Certificate]:
        for inviter in inviters:
            for certificate in self._issued.get(inviter, ()):
                allowed = certificate.epoch == 0 or inviter == self.founder
                if allowed and counts(certificate):
                    yield certificate

    def _valid_revocations(self, node_id: str) -> list[Revocation]:
        """Return the revocations of a box whose signers were ever entitled to them."""
        revocations = self._revocations.get(node_id)
        if not revocations or node_id == self.founder:
            return []
        ever = self._ever_levels()
        inviters = {certificate.inviter for certificate in self._certificates.get(node_id, ())}
        return [
            revocation
            for revocation in revocations
            if (level := ever.get(node_of(revocation.signer), _LAST)) == _ADMIN
            or (level < _LAST and revocation.signer in inviters)
        ]

    def _is_valid(self, certificate: Certificate) -> bool:
        revocations = self._valid_revocations(node_of(certificate.node))
        if certificate.epoch == 0:
            return not revocations
        return all(
            revocation.epoch < certificate.epoch
            for revocation in revocations
            if node_of(revocation.signer) == self.founder
        )

    # Comparing

    def buckets(self) -> list[bytes]:
        """Return 8 bytes for each bucket of the records, by which two rosters find where they
        differ."""
        if self._buckets is None:
            buckets: list[list[bytes]] = [[] for _ in range(BUCKETS)]
            for key in sorted(self._records):
                buckets[key[0] % BUCKETS].append(key)
            self._buckets = [truncated_hash(*keys, size=8) for keys in buckets]
        return self._buckets

    def digest(self) -> bytes:
        """Return 16 bytes of all records."""
        return truncated_hash(*self.buckets(), size=16)

    def in_bucket(self, bucket: int) -> list[bytes]:
        """Return the ids of the records of a bucket."""
        return [key for key in self._records if key[0] % BUCKETS == bucket]

    # Signing

    def check_may_invite(self, node_id: str, *, admin: bool = False) -> None:
        """Raise ValueError, with a sentence, if a box may not invite."""
        level = self.members().get(node_id, _LAST)
        if level == _LAST:
            raise ValueError("this box may not invite: ask an admin of the network to do it")
        if admin and level != _ADMIN:
            raise ValueError("only an admin of the network can invite an admin")

    def certify(
        self, identity: Identity, node_id: str, name: str, at: float, *, admin: bool = False
    ) -> Record:
        """Sign and admit a certificate; `at` in Unix seconds.  Raises ValueError with a sentence if
        this box may not."""
        me = identity.node_id
        self.check_may_invite(me, admin=admin)
        epoch = self._epoch(node_id)
        if self.revoked(node_id):
            if me != self.founder:
                raise ValueError("that box was revoked: only the network's founder can readmit it")
            epoch += 1
        serial = 1 + max((cert.serial for cert in self._certificates.get(node_id, ())), default=0)
        serial = min(serial, MAX_COUNTER)
        certificate = Certificate(
            network=self.network_key,
            node=key_of(node_id),
            inviter=key_of(me),
            name=name,
            issued_at=round(at * 1000),
            serial=serial,
            admin=admin,
            epoch=epoch if me == self.founder else 0,
        )
        return self._admit_own(seal(identity, "member", certificate))

    def revoke(self, identity: Identity, node_id: str, at: float, reason: str = "") -> Record:
        """Sign and admit a revocation; `at` in Unix seconds.  Raises ValueError with a sentence if
        this box may not."""
        me = identity.node_id
        if node_id == self.founder:
            raise ValueError("the founder of the network cannot be revoked")
        invited = any(
            certificate.inviter == key_of(me) for certificate in self._certificates.get(node_id, ())
        )
        if self.members().get(me, _LAST) != _ADMIN and not invited:
            raise ValueError("only an admin, or whoever invited a box, can revoke it")
        epoch = self._epoch(node_id) if me == self.founder else 0
        revocation = Revocation(
            self.network_key, key_of(node_id), key_of(me), round(at * 1000), reason, epoch
        )
        return self._admit_own(seal(identity, "revocation", revocation))

    def _epoch(self, node_id: str) -> int:
        """Return the last epoch that the founder gave the box; those of others do not count."""
        epochs = [
            certificate.epoch
            for certificate in self._certificates.get(node_id, ())
            if node_of(certificate.inviter) == self.founder
        ]
        return max(epochs, default=0)

    def _admit_own(self, record: Record) -> Record:
        update = self.admit([record])
        for why in (*update.forged, *update.refused):
            raise ValueError(why)
        return record
