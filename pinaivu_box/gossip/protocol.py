"""The gossip protocol: what is sent to which peer, and when.  No I/O: the caller provides clock,
randomness and sending.

- Membership is pushed: a new certificate or revocation goes to every link at once.  Every 10 s one
  link, drawn at random, is asked whether the rosters agree; if not, the differing parts are sent.
- Adverts are announced by id once a second and sent to peers that lack them; our own go out whole.
- Load is reported to the links at once, and by them to those that ask (`loads`).
- A lost link is reported, so that others need not find out by failing (`adverts.GoneReport`).
- A link is accepted if the peer is a member.  Until then it may send the certificates that make it
  one, and no more.
- A peer that sends what no honest box passes on, or too much, is disconnected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from msgspec.structs import asdict

from pinaivu_box.bounded import BoundedDict
from pinaivu_box.gossip import adverts
from pinaivu_box.gossip.adverts import Advert, Adverts, Facts, GoneReport, TokenBucket
from pinaivu_box.gossip.frames import (
    MAX_AGE_MS,
    MAX_IDS,
    MEMBER_ID,
    NEWS_ID,
    BucketHashes,
    Frame,
    GivenRecord,
    GiveRecords,
    HaveRecords,
    LoadQuery,
    LoadReport,
    LoadUpdate,
    RosterDigest,
    WantRecords,
    batches,
    decode,
    encode,
    ids,
)
from pinaivu_box.gossip.loads import Loads
from pinaivu_box.identity import Identity
from pinaivu_box.membership import records as membership_records
from pinaivu_box.membership.records import MAX_COUNTER, Invalid, Record, key_of, node_of, seal
from pinaivu_box.membership.roster import BUCKETS, MAX_PROOF, Roster

TICK_SECONDS = 1.0  # between two calls of `tick`, better not in all boxes at the same moment
_COMPARE_SECONDS = 10.0
_CERTIFICATE_SECONDS = 5.0  # for a new link to show that the peer is a member
_LINK_BURST_BYTES, _LINK_BYTES_PER_SECOND = 8_000_000.0, 256_000.0
_MEMBERSHIP = ("member", "revocation")
_MAX_REJECTED_IDS = 16384  # of records that came and were not kept
_ANSWER_SECONDS = 3.0  # for a record that was asked for
_MAX_OTHER_PEERS = 32  # remembered as having offered the same record


class Effects(Protocol):
    """What the gossip has its caller do."""

    def send(self, peer: str, frame: bytes) -> None: ...

    def disconnect(self, peer: str, why: str) -> None:
        """Close the link; `link_down` is not called for it."""

    def roster_changed(self) -> None:
        """The roster has new records, which should be stored."""


@dataclass(slots=True)
class _PendingRecord:
    """A record that `peer` was asked for; `others` have offered it as well."""

    peer: str
    deadline: float
    others: list[str] = field(default_factory=list)


class RecordRequests:
    """Records that others have offered and this box lacks: one peer is asked for each at a time,
    and the next one if it does not answer."""

    def __init__(self) -> None:
        self._pending: dict[bytes, _PendingRecord] = {}
        self._count: Counter[str] = Counter()  # of the records that a peer was asked for

    def offered(self, peer: str, key: bytes, now: float) -> bool:
        """Note that a peer has a record; returns whether to ask it for that now."""
        if pending := self._pending.get(key):
            if len(pending.others) < _MAX_OTHER_PEERS:
                pending.others.append(peer)
            return False
        if self._count[peer] >= MAX_IDS:
            return False
        self._count[peer] += 1
        self._pending[key] = _PendingRecord(peer, now + _ANSWER_SECONDS)
        return True

    def answered(self, key: bytes) -> Iterable[str]:
        """Note that a record has come; returns which other peers have offered it."""
        pending = self._pending.pop(key, None)
        if pending is None:
            return ()
        self._count[pending.peer] -= 1
        if self._count[pending.peer] <= 0:
            del self._count[pending.peer]
        return pending.others

    def retry(self, now: float, linked: Container[str]) -> dict[str, list[bytes]]:
        """Return whom to ask now for the records that others did not send in time."""
        retries: dict[str, list[bytes]] = {}
        for key, pending in list(self._pending.items()):
            if pending.deadline > now and pending.peer in linked:
                continue
            self.answered(key)
            others = [peer for peer in pending.others if peer in linked]
            if others and self.offered(others[0], key, now):
                self._pending[key].others = others[1:]
                retries.setdefault(others[0], []).append(key)
        return retries


class _GossipLink:
    """`accepted`: the peer is a member; `accepted_by_peer`: it takes this box for one.
    `early_digest` came before it was accepted.  `announce`: ids to announce to it."""

    def __init__(self, now: float) -> None:
        self.opened_at = now
        self.accepted = self.accepted_by_peer = False
        self.early_digest: RosterDigest | None = None
        self.announce: dict[bytes, None] = {}
        self.limit = TokenBucket(_LINK_BURST_BYTES)


class Gossip:
    """The state of one box.  `clock`: monotonic seconds; `wall`: Unix seconds, which are only sent.
    `facts`: what this box offers, set by the caller."""

    def __init__(
        self,
        identity: Identity,
        roster: Roster,
        effects: Effects,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        random: Random,
    ) -> None:
        self.me = identity.node_id
        self.roster = roster
        self.adverts = Adverts()
        self.loads = Loads(clock)
        self.links: dict[str, _GossipLink] = {}
        self.facts: Facts | None = None
        self._identity, self._effects = identity, effects
        self._clock, self._wall, self._random = clock, wall, random
        self._requests = RecordRequests()
        self._rejected: BoundedDict[bytes, None] = BoundedDict(_MAX_REJECTED_IDS)
        self._lost_links: dict[str, float] = {}  # when
        self._serial = 0
        self._advert_due = clock()
        self._advertised: tuple[object, ...] = ()  # the gist of the last advert
        self._advert_limit = TokenBucket(2.0)
        self._compare_at = clock() + random.uniform(0, _COMPARE_SECONDS)

    # Events

    def link_up(self, peer: str) -> None:
        """There is a link; the handshake has proven to whom."""
        self.links[peer] = _GossipLink(self._clock())
        self._lost_links.pop(peer, None)
        self._give([peer], map(GivenRecord, self.roster.proof(self.me)))
        if peer in self.roster.members():
            self._accept(peer)

    def link_down(self, peer: str, *, lost: bool) -> None:
        """The link has ended; `lost`: without being closed by either side."""
        self.loads.link_down(peer)
        if self.links.pop(peer, None) and lost:
            self._lost_links[peer] = self._clock()

    def receive(self, peer: str, frame: bytes) -> None:
        """Process a frame that has come over the link to a peer."""
        link = self.links.get(peer)
        if link is None:
            return  # it was on its way when the peer was disconnected
        if not link.limit.take(_LINK_BYTES_PER_SECOND, self._clock(), len(frame)):
            self._disconnect(peer, "it sends too much")
            return
        try:
            self._process(peer, link, decode(frame))
        except Invalid as error:
            self._disconnect(peer, f"it sent {error}")

    def _process(self, peer: str, link: _GossipLink, message: Frame) -> None:
        # A peer that does not take this box for a member sends certificates, and no digest.
        link.accepted_by_peer |= isinstance(message, RosterDigest)
        if not link.accepted:
            self._receive_unaccepted(peer, message)
            return
        match message:
            case HaveRecords():
                self._receive_have(peer, link, message)
            case WantRecords():
                self._receive_want(peer, message)
            case GiveRecords():
                self._receive_records(peer, message)
            case LoadUpdate() | LoadQuery() | LoadReport():
                if answer := self.loads.receive(peer, message):
                    self._send(peer, answer)
            case _:
                self._compare(peer, message)

    def accepted_by(self, peer: str) -> bool:
        """Whether a peer is linked and takes this box for a member."""
        return peer in self.links and self.links[peer].accepted_by_peer

    def spread(self, records: Iterable[Record], source: str = "") -> None:
        """Send records that are new in the roster to the links, except to their source."""
        others = [peer for peer in self._accepted_peers() if peer != source]
        self._give(others, map(GivenRecord, records))
        self._check_links()
        self._effects.roster_changed()

    def tick(self) -> None:
        """Do what is due by time: adverts, reports, announcements, retries, comparisons."""
        now = self._clock()
        self.push_load()
        self._send_advert(now)
        self._report_lost(now)
        for peer, keys in self._requests.retry(now, self.links).items():
            self._request(peer, keys)
        for peer, link in list(self.links.items()):
            if not link.accepted and now - link.opened_at > _CERTIFICATE_SECONDS:
                self._disconnect(peer, self.roster.member(peer).why)
            self._announce(peer, list(link.announce))
            link.announce.clear()
        if now >= self._compare_at:
            self._compare_at = now + _COMPARE_SECONDS
            if accepted := self._accepted_peers():
                self._send(self._random.choice(accepted), self._digest())
            for key in self.adverts.forget(now, self.roster.members()):
                self._rejected[key] = None

    def push_load(self) -> None:
        """Report our own load to the links, if it has changed."""
        if self.facts and (update := self.loads.update(self.facts.models)):
            self._send_to_neighbours(update)

    def query_load(self, model: str) -> None:
        """Ask the links for the loads that they know."""
        self._send_to_neighbours(self.loads.query(model))

    def _send_to_neighbours(self, frame: LoadUpdate | LoadQuery) -> None:
        for peer in self.loads.neighbours:
            self._send(peer, frame)

    # Membership

    def _receive_unaccepted(self, peer: str, message: Frame) -> None:
        """The peer may show that it is a member; all else has to wait, and is asked for again."""
        if isinstance(message, GiveRecords) and len(message.records) <= MAX_PROOF:
            records = [given_record.record for given_record in message.records]
            self._admit(peer, [record for record in records if record.kind in _MEMBERSHIP])
        elif isinstance(message, RosterDigest):
            self.links[peer].early_digest = message

    def _accept(self, peer: str) -> None:
        link = self.links[peer]
        link.accepted = True
        self._send(peer, self._digest())
        # Digests only say whose adverts there are: one that we sent before the link may be newer.
        if own := self.adverts.get(self.me):
            self._give([peer], self._news([own.id]))
        if link.early_digest is not None:
            self._compare(peer, link.early_digest)

    def _digest(self) -> RosterDigest:
        return RosterDigest(self.roster.digest(), self.adverts.digest())

    def _announce(self, peer: str, keys: list[bytes]) -> None:
        for start in range(0, len(keys), MAX_IDS):
            self._send(peer, HaveRecords(news=b"".join(keys[start : start + MAX_IDS])))

    def _admit(self, peer: str, records: list[Record]) -> None:
        update = self.roster.admit(records)
        if update.new:
            self.spread(update.new, peer)
        for why in update.forged:
            raise Invalid(why)

    def _check_links(self) -> None:
        members = self.roster.members()
        for peer, link in list(self.links.items()):
            if link.accepted and peer not in members:
                self._disconnect(peer, self.roster.member(peer).why)
            elif not link.accepted and peer in members:
                self._accept(peer)

    def _compare(self, peer: str, message: RosterDigest | BucketHashes) -> None:
        if isinstance(message, RosterDigest):
            if message.digest != self.roster.digest():
                self._send(peer, BucketHashes(b"".join(self.roster.buckets())))
            if message.news != self.adverts.digest():
                self._announce(peer, self.adverts.ids())
            if message.news and (update := self.loads.link_up(peer)):
                self._send(peer, update)
            return
        theirs, ours = ids(message.parts, 8), self.roster.buckets()
        differing = [bucket for bucket in range(BUCKETS) if theirs[bucket] != ours[bucket]]
        keys = [key for bucket in differing for key in self.roster.in_bucket(bucket)]
        for start in range(0, len(keys), MAX_IDS):
            self._send(peer, HaveRecords(members=b"".join(keys[start : start + MAX_IDS])))
        if differing and not message.answer:
            self._send(peer, BucketHashes(b"".join(ours), answer=True))

    # Adverts and reports

    def _send_advert(self, now: float) -> None:
        """Send an advert if one is due: after a change, else once a period."""
        members = len(self.roster.members())
        if self.facts is None or self.me not in self.roster.members():
            return
        gist = self.facts.gist()
        if gist == self._advertised and now < self._advert_due:
            return
        if not self._advert_limit.take(1 / adverts.min_gap(members), now):
            return
        # Boxes that started together, after a power cut, should not send together for ever.
        self._advert_due = now + adverts.period(members) * self._random.uniform(0.75, 1.0)
        self._advertised = gist
        wall_ms = round(self._wall() * 1000)
        self._serial = min(max(self._serial + 1, wall_ms), MAX_COUNTER)
        life = round(adverts.PERIODS_PER_LIFE * adverts.period(members))
        network, key = self.roster.network_key, key_of(self.me)
        facts: dict[str, Any] = asdict(self.facts)
        advert = Advert(network, key, self._serial, wall_ms, life, **facts)
        record = seal(self._identity, "advert", advert)
        self.adverts.accept(advert, record, 0.0, now, members)
        self._give_all(GivenRecord(record))

    def _report_lost(self, now: float) -> None:
        """Report boxes gone whose links were lost, unless so many are that it rather seems to be
        our own network."""
        overdue = [peer for peer, at in self._lost_links.items() if now - at >= TICK_SECONDS]
        if len(self._lost_links) <= len(self.links):
            for peer in overdue:
                entry = self.adverts.get(peer)
                if entry is not None and not self.adverts.gone(peer):
                    self._report_gone(entry.advert, now)
        for peer in overdue:
            del self._lost_links[peer]

    def _report_gone(self, last: Advert, now: float) -> None:
        report = GoneReport(last.network, last.node, last.serial, key_of(self.me))
        record = seal(self._identity, "gone", report)
        if self.adverts.report(report, record, now) is None:
            self._give_all(GivenRecord(record))

    def _receive_records(self, peer: str, give: GiveRecords) -> None:
        records = [given_record.record for given_record in give.records]
        if members := [record for record in records if record.kind in _MEMBERSHIP]:
            for record in members:
                self._requests.answered(membership_records.record_id(record))
            self._admit(peer, members)
        for given_record in give.records:
            if given_record.record.kind not in _MEMBERSHIP:
                self._receive_news(peer, given_record)

    def _receive_news(self, peer: str, given_record: GivenRecord) -> None:
        content = adverts.read(given_record.record)
        if content.network != self.roster.network_key:
            raise Invalid("a record of another network")
        key = adverts.record_id(given_record.record, content)
        holders = {peer, *self._requests.answered(key)}
        if self.adverts.find(key) or key in self._rejected:
            return
        if self._keep_news(content, given_record):
            for other, link in self.links.items():
                if link.accepted and other not in holders:
                    link.announce[key] = None
        elif adverts.signer_of(content) in self.roster.members():
            self._rejected[key] = None  # others may yet turn out to be members
            self._return_newer(peer, content)

    def _return_newer(self, peer: str, content: Advert | GoneReport) -> None:
        """Send a box its newest advert, expired or not, if it sends an older one of itself: its
        clock was ahead and is right now, and it continues from that serial."""
        if not isinstance(content, Advert) or content.node_id != peer:
            return
        if (newer := self.adverts.newer(content)) is not None:
            self._give([peer], [self._with_age(newer.record, newer.sent_at)])

    def _keep_news(self, content: Advert | GoneReport, given_record: GivenRecord) -> bool:
        """Keep an advert or report; returns whether it was kept."""
        now, members = self._clock(), self.roster.members()
        if isinstance(content, GoneReport):
            node = node_of(content.node)
            if node == self.me and content.serial == self._serial:
                self._advertised = ()  # refute it by a new advert
            if node == self.me or node in self.links or node_of(content.reporter) not in members:
                return False
            return self.adverts.report(content, given_record.record, now) is None
        if content.node_id == self.me:
            if content.serial > self._serial:  # from before our clock was set back
                self._serial, self._advertised = content.serial, ()
            return False
        if content.node_id not in members:
            return False
        before = self.adverts.get(content.node_id)
        rejected = self.adverts.accept(
            content, given_record.record, given_record.age_ms / 1000, now, len(members)
        )
        if rejected is None and before is not None:
            self._rejected[before.id] = None
        return rejected is None

    # Requesting and sending records

    def _receive_have(self, peer: str, link: _GossipLink, have: HaveRecords) -> None:
        now = self._clock()
        offered = [*ids(have.members, MEMBER_ID), *ids(have.news, NEWS_ID)]
        for key in offered:
            link.announce.pop(key, None)
        missing = [key for key in offered if not self._has(key)]
        self._request(peer, [key for key in missing if self._requests.offered(peer, key, now)])

    def _has(self, key: bytes) -> bool:
        known = self.adverts.find(key) is not None or key in self._rejected
        return known or key in self.roster

    def _request(self, peer: str, keys: list[bytes]) -> None:
        members = b"".join(key for key in keys if len(key) == MEMBER_ID)
        news = b"".join(key for key in keys if len(key) == NEWS_ID)
        if members or news:
            self._send(peer, WantRecords(members, news))

    def _receive_want(self, peer: str, want: WantRecords) -> None:
        members = [
            GivenRecord(record)
            for key in ids(want.members, MEMBER_ID)
            if (record := self.roster.get(key))
        ]
        self._give([peer], [*members, *self._news(ids(want.news, NEWS_ID))])

    def _news(self, keys: Iterable[bytes]) -> list[GivenRecord]:
        """Return those of the adverts and reports that this box has, with their age."""
        found = filter(None, map(self.adverts.find, keys))
        return [self._with_age(record, sent_at) for record, sent_at in found]

    def _with_age(self, record: Record, sent_at: float) -> GivenRecord:
        age_ms = round((self._clock() - sent_at) * 1000)
        return GivenRecord(record, min(max(0, age_ms), MAX_AGE_MS))

    def _give(self, peers: Iterable[str], records: Iterable[GivenRecord]) -> None:
        for frame in map(encode, batches(records)):
            for peer in peers:
                self._effects.send(peer, frame)

    def _give_all(self, record: GivenRecord) -> None:
        self._give(self._accepted_peers(), [record])

    def _accepted_peers(self) -> list[str]:
        return [peer for peer, link in self.links.items() if link.accepted]

    def _send(self, peer: str, frame: Frame) -> None:
        self._effects.send(peer, encode(frame))

    def _disconnect(self, peer: str, why: str) -> None:
        self.loads.link_down(peer)
        if self.links.pop(peer, None):
            self._effects.disconnect(peer, why)
