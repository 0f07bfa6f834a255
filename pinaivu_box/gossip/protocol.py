"""Who tells whom what and when.  No I/O: clock, randomness and sending are given.

- Membership is pushed: a new certificate or revocation goes to every link at once, and every 10 s
  one link, drawn at random, is asked whether the rosters agree; where not, the parts that differ.
- Adverts are announced by id once a second and sent to whoever lacks them; our own go out whole.
- Every request that begins or ends is told to the links, who tell it to those that ask (`loads`).
- A link that broke is reported, so that others need not find out by failing (see `advert.Gone`).
- A link speaks for a member.  A stranger may show the certificates that make it one, and no more.
- Whoever sends what no honest box passes on, or too much, is cut off.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable
from random import Random
from typing import Any, NamedTuple, Protocol

from msgspec.structs import asdict

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

TICK = 1.0  # seconds between two calls of `tick`, better not all boxes at the same moment
_COMPARE_SECONDS = 10.0
_STRANGER_SECONDS = 5.0
_LINK_BURST, _LINK_RATE = 8_000_000.0, 256_000.0  # bytes, bytes a second
_MEMBERSHIP = ("member", "revocation")
_REMEMBERED = 16384  # ids of what came and does not count


class Effects(Protocol):
    def send(self, peer: str, frame: bytes) -> None: ...

    def cut(self, peer: str, why: str) -> None:
        """End the link; `unlinked` is not called for it."""

    def changed(self) -> None:
        """The roster has changed; what is new of it should be stored."""


class _GossipLink:
    def __init__(self, now: float) -> None:
        self.since = now
        self.greeted = False  # by us, who take it for a member
        self.welcomed = False  # by it, which takes us for one
        self.early: RosterDigest | None = None  # it said this when we did not know it yet
        self.announce: dict[bytes, None] = {}
        self.allowed = TokenBucket(_LINK_BURST)


class RecordReaders(NamedTuple):
    """How records are checked; the simulation remembers what was checked."""

    member: Callable[[Record], membership_records.Statement] = membership_records.read
    news: Callable[[Record], Advert | GoneReport] = adverts.read


class Gossip:
    """`clock`: monotonic seconds; `wall`: Unix seconds, only said, never believed."""

    def __init__(
        self,
        identity: Identity,
        roster: Roster,
        effects: Effects,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        random: Random,
        readers: RecordReaders = RecordReaders(),  # noqa: B008, it cannot change
    ) -> None:
        self.me = identity.node_id
        self.roster = roster
        self.adverts = Adverts()
        self.loads = Loads(clock)
        self.links: dict[str, _GossipLink] = {}
        self.facts: Facts | None = None
        self._identity, self._effects, self._readers = identity, effects, readers
        self._clock, self._wall, self._random = clock, wall, random
        self._asking = RecordRequests()
        self._ignored: OrderedDict[bytes, None] = OrderedDict()
        self._lost: dict[str, float] = {}
        self._serial = 0
        self._due = clock()
        self._said: tuple[object, ...] = ()
        self._speech = TokenBucket(2.0)
        self._compared = clock() + random.uniform(0, _COMPARE_SECONDS)

    # What happens to us

    def linked(self, peer: str) -> None:
        """A link stands; the handshake has proven who it is."""
        self.links[peer] = _GossipLink(self._clock())
        self._lost.pop(peer, None)
        self._give([peer], [GivenRecord(record) for record in self.roster.proof(self.me)])
        if peer in self.roster.members():
            self._greet(peer)

    def unlinked(self, peer: str, *, lost: bool) -> None:
        """`lost`: it broke; nobody said goodbye."""
        self.loads.ended(peer)
        if self.links.pop(peer, None) and lost:
            self._lost[peer] = self._clock()

    def received(self, peer: str, frame: bytes) -> None:
        link = self.links.get(peer)
        if link is None:
            return  # what was under way when it was cut
        if not link.allowed.take(_LINK_RATE, self._clock(), len(frame)):
            self._cut(peer, "it sends too much")
            return
        try:
            found = decode(frame)
            link.welcomed |= isinstance(found, RosterDigest)  # others hear no more than who we are
            if not link.greeted:
                self._stranger(peer, found)
            elif isinstance(found, HaveRecords):
                self._have(peer, link, found)
            elif isinstance(found, WantRecords):
                self._want(peer, found)
            elif isinstance(found, GiveRecords):
                self._take(peer, found)
            elif isinstance(found, LoadUpdate | LoadQuery | LoadReport):
                if answer := self.loads.hear(peer, found):
                    self._send(peer, answer)
            else:
                self._compare(peer, found)
        except Invalid as error:
            self._cut(peer, f"it sent {error}")

    def welcomed(self, peer: str) -> bool:
        """Whether it is linked, and takes us for a member."""
        return peer in self.links and self.links[peer].welcomed

    def add(self, records: Iterable[Record]) -> None:
        """Records that came with a ticket, or from the store: keep them and tell everybody."""
        self._admit("", list(records))

    def tell(self, records: Iterable[Record]) -> None:
        """The roster's own new records, which we have just signed."""
        self._spread("", list(records))

    def tick(self) -> None:
        """What time brings: adverts due, announcements, questions unanswered, comparisons."""
        now = self._clock()
        self.push()
        self._speak(now)
        self._report(now)
        for peer, numbers in self._asking.again(now, self.links).items():
            self._ask(peer, numbers)
        for peer, link in list(self.links.items()):
            if not link.greeted and now - link.since > _STRANGER_SECONDS:
                self._cut(peer, self.roster.member(peer).why)
            self._announce(peer, list(link.announce))
            link.announce.clear()
        if now >= self._compared:
            self._compared = now + _COMPARE_SECONDS
            if greeted := [peer for peer, link in self.links.items() if link.greeted]:
                self._send(self._random.choice(greeted), self._digest())
            for number in self.adverts.forget(now, self.roster.members()):
                self._ignore(number)

    def push(self) -> None:
        """Tell the links at once how busy we are, if that has changed."""
        if self.facts and (busy := self.loads.changed(self.facts.models)):
            self._tell_links(busy)

    def ask(self, model: str) -> None:
        """The links, how busy those are that they are linked with."""
        self._tell_links(self.loads.ask(model))

    def _tell_links(self, frame: LoadUpdate | LoadQuery) -> None:
        for peer in self.loads.listeners:
            self._send(peer, frame)

    # Membership

    def _stranger(self, peer: str, found: object) -> None:
        """It may show that it belongs; all else waits until it does, and is asked for again."""
        if isinstance(found, GiveRecords) and len(found.records) <= MAX_PROOF:
            shown = [one.record for one in found.records]
            self._admit(peer, [one for one in shown if one.kind in _MEMBERSHIP])
        elif isinstance(found, RosterDigest):
            self.links[peer].early = found

    def _greet(self, peer: str) -> None:
        link = self.links[peer]
        link.greeted = True
        self._send(peer, self._digest())
        # Digests say only whose adverts there are: what we said while no link stood is newer.
        if own := self.adverts.get(self.me):
            self._give([peer], self._news([own.id]))
        if link.early is not None:
            self._compare(peer, link.early)

    def _digest(self) -> RosterDigest:
        return RosterDigest(self.roster.digest(), self.adverts.digest())

    def _announce(self, peer: str, numbers: list[bytes]) -> None:
        for at in range(0, len(numbers), MAX_IDS):
            self._send(peer, HaveRecords(news=b"".join(numbers[at : at + MAX_IDS])))

    def _admit(self, peer: str, records: list[Record]) -> None:
        done = self.roster.admit(records, self._readers.member)
        if done.new:
            self._spread(peer, done.new)
        for _, why in done.forged:
            raise Invalid(why)

    def _spread(self, peer: str, new: list[Record]) -> None:
        others = [one for one, link in self.links.items() if link.greeted and one != peer]
        self._give(others, [GivenRecord(record) for record in new])
        self._check_links()
        self._effects.changed()

    def _check_links(self) -> None:
        members = self.roster.members()
        for peer, link in list(self.links.items()):
            if link.greeted and peer not in members:
                self._cut(peer, self.roster.member(peer).why)
            elif not link.greeted and peer in members:
                self._greet(peer)

    def _compare(self, peer: str, found: RosterDigest | BucketHashes) -> None:
        if isinstance(found, RosterDigest):
            if found.digest != self.roster.digest():
                self._send(peer, BucketHashes(b"".join(self.roster.buckets())))
            if found.news != self.adverts.digest():
                self._announce(peer, self.adverts.ids())
            if found.news and (busy := self.loads.linked(peer)):
                self._send(peer, busy)
            return
        theirs, ours = ids(found.parts, 8), self.roster.buckets()
        differ = [number for number in range(BUCKETS) if theirs[number] != ours[number]]
        mine = [one for number in differ for one in self.roster.in_bucket(number)]
        for at in range(0, len(mine), MAX_IDS):
            self._send(peer, HaveRecords(members=b"".join(mine[at : at + MAX_IDS])))
        if differ and not found.answer:
            self._send(peer, BucketHashes(b"".join(ours), answer=True))

    # Adverts and reports

    def _speak(self, now: float) -> None:
        """Send an advert if one is due: on a change, else once a period."""
        members = len(self.roster.members())
        if self.facts is None or self.me not in self.roster.members():
            return
        gist = self.facts.gist()
        if gist == self._said and now < self._due:
            return
        if not self._speech.take(1 / adverts.gap(members), now):
            return
        # Boxes that started together, after a power cut, should not speak together for ever.
        self._due = now + adverts.period(members) * self._random.uniform(0.75, 1.0)
        self._said = gist
        wall_ms = round(self._wall() * 1000)
        self._serial = min(max(self._serial + 1, wall_ms), MAX_COUNTER)
        life = round(adverts.LIVES * adverts.period(members))
        network, key = self.roster.network_key, key_of(self.me)
        own: dict[str, Any] = asdict(self.facts)
        made = Advert(network, key, self._serial, wall_ms, life, **own)
        record = seal(self._identity, "advert", made)
        self.adverts.accept(made, record, 0.0, now, wall_ms, members)
        self._give_all(GivenRecord(record))

    def _report(self, now: float) -> None:
        """Call lost ones gone, unless it rather seems that we are."""
        waited = [peer for peer, at in self._lost.items() if now - at >= TICK]
        if len(self._lost) <= len(self.links):
            for peer in waited:
                held = self.adverts.get(peer)
                if held is not None and not self.adverts.gone(peer):
                    gone = GoneReport(self.roster.network_key, key_of(peer), held.advert.serial,
                                key_of(self.me))  # fmt: skip
                    record = seal(self._identity, "gone", gone)
                    if self.adverts.report(gone, record, now) is None:
                        self._give_all(GivenRecord(record))
        for peer in waited:
            del self._lost[peer]

    def _take(self, peer: str, give: GiveRecords) -> None:
        members = [one.record for one in give.records if one.record.kind in _MEMBERSHIP]
        if members:
            for record in members:
                self._asking.answered(membership_records.record_id(record))
            self._admit(peer, members)
        for given in give.records:
            if given.record.kind not in _MEMBERSHIP:
                self._hear(peer, given)

    def _hear(self, peer: str, given: GivenRecord) -> None:
        content = self._readers.news(given.record)
        if content.network != self.roster.network_key:
            raise Invalid("a record of another network")
        number = adverts.record_id(given.record, content)
        has = {peer, *self._asking.answered(number)}
        if self.adverts.find(number) or number in self._ignored:
            return
        if self._counts(content, given):
            for other, link in self.links.items():
                if link.greeted and other not in has:
                    link.announce[number] = None
        elif adverts.signer_of(content) in self.roster.members():
            self._ignore(number)  # of others we may yet learn that they belong
            self._remind(peer, content)

    def _remind(self, peer: str, content: Advert | GoneReport) -> None:
        """A box that says of itself what is older than its last word, which may have expired: its
        clock was ahead then, and is right now.  With that it knows from where to go on."""
        if not isinstance(content, Advert) or content.node_id != peer:
            return
        if (newer := self.adverts.newer(content)) is not None:
            record, sent = newer
            age = round((self._clock() - sent) * 1000)
            self._give([peer], [GivenRecord(record, min(max(0, age), MAX_AGE_MS))])

    def _counts(self, content: Advert | GoneReport, given: GivenRecord) -> bool:
        now, members = self._clock(), self.roster.members()
        if isinstance(content, GoneReport):
            node = node_of(content.node)
            if node == self.me and content.serial == self._serial:
                self._said = ()  # speak again
            if node == self.me or node in self.links or node_of(content.reporter) not in members:
                return False
            return self.adverts.report(content, given.record, now) is None
        if content.node_id == self.me:
            if content.serial > self._serial:  # from before our clock went back
                self._serial, self._said = content.serial, ()
            return False
        if content.node_id not in members:
            return False
        was = self.adverts.get(content.node_id)
        wall_ms = round(self._wall() * 1000)
        refused = self.adverts.accept(
            content, given.record, given.age_ms / 1000, now, wall_ms, len(members)
        )
        if refused is None and was is not None:
            self._ignore(was.id)
        return refused is None

    # Asking and giving

    def _have(self, peer: str, link: _GossipLink, have: HaveRecords) -> None:
        now = self._clock()
        offered = [*ids(have.members, MEMBER_ID), *ids(have.news, NEWS_ID)]
        for number in offered:
            link.announce.pop(number, None)
        self._ask(
            peer,
            [
                number
                for number in offered
                if not (
                    self.adverts.find(number) or number in self._ignored or number in self.roster
                )
                and self._asking.offered(peer, number, now)
            ],
        )

    def _ask(self, peer: str, numbers: list[bytes]) -> None:
        members = b"".join(number for number in numbers if len(number) == MEMBER_ID)
        news = b"".join(number for number in numbers if len(number) == NEWS_ID)
        if members or news:
            self._send(peer, WantRecords(members, news))

    def _want(self, peer: str, want: WantRecords) -> None:
        found = [
            GivenRecord(record)
            for number in ids(want.members, MEMBER_ID)
            if (record := self.roster.get(number))
        ]
        self._give([peer], [*found, *self._news(ids(want.news, NEWS_ID))])

    def _news(self, numbers: Iterable[bytes]) -> list[GivenRecord]:
        """Those of the adverts and reports that we hold, with how old they are."""
        held, now = map(self.adverts.find, numbers), self._clock()
        return [
            GivenRecord(record, max(0, round((now - sent_at) * 1000)))
            for record, sent_at in filter(None, held)
        ]

    def _give(self, peers: Iterable[str], given: list[GivenRecord]) -> None:
        for frame in map(encode, batches(given)):
            for peer in peers:
                self._effects.send(peer, frame)

    def _give_all(self, given: GivenRecord) -> None:
        self._give([peer for peer, link in self.links.items() if link.greeted], [given])

    def _send(self, peer: str, frame: Frame) -> None:
        self._effects.send(peer, encode(frame))

    def _cut(self, peer: str, why: str) -> None:
        self.loads.ended(peer)
        if self.links.pop(peer, None):
            self._effects.cut(peer, why)

    def _ignore(self, number: bytes) -> None:
        self._ignored[number] = None
        if len(self._ignored) > _REMEMBERED:
            self._ignored.popitem(last=False)


_ANSWER_SECONDS = 3.0
_OTHERS = 32


class _Question:
    __slots__ = ("others", "peer", "until")

    def __init__(self, peer: str, until: float) -> None:
        self.peer, self.until = peer, until
        self.others: list[str] = []


class RecordRequests:
    def __init__(self) -> None:
        self._open: dict[bytes, _Question] = {}
        self._of: Counter[str] = Counter()  # open questions to a peer

    def offered(self, peer: str, number: bytes, now: float) -> bool:
        """Whether to ask that peer now."""
        if question := self._open.get(number):
            if len(question.others) < _OTHERS:
                question.others.append(peer)
            return False
        if self._of[peer] >= MAX_IDS:
            return False
        self._of[peer] += 1
        self._open[number] = _Question(peer, now + _ANSWER_SECONDS)
        return True

    def answered(self, number: bytes) -> Iterable[str]:
        """Who else offered it."""
        question = self._open.pop(number, None)
        if question is None:
            return ()
        self._settle(question.peer)
        return question.others

    def again(self, now: float, linked: Container[str]) -> dict[str, list[bytes]]:
        """Whom to ask now for what others did not give."""
        asked: dict[str, list[bytes]] = {}
        for number, question in list(self._open.items()):
            if question.until > now and question.peer in linked:
                continue
            self.answered(number)
            left = [peer for peer in question.others if peer in linked]
            if left and self.offered(left[0], number, now):
                self._open[number].others = left[1:]
                asked.setdefault(left[0], []).append(number)
        return asked

    def _settle(self, peer: str) -> None:
        self._of[peer] -= 1
        if self._of[peer] <= 0:
            del self._of[peer]
