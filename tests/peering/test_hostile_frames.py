"""Every decoder of the wire, fed with what no box sends: it reads it, or says what is wrong."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import msgspec
import pytest
from msgspec import Struct

from pinaivu_box.engine.messages import Sampling, SamplingDefaults, TokenLogprob
from pinaivu_box.errors import InvalidBody, ProtocolError
from pinaivu_box.files import wire as file_wire
from pinaivu_box.gossip import adverts, frames
from pinaivu_box.ledger import wire as ledger_wire
from pinaivu_box.ledger.reconcile import EntryRange, EntrySummary
from pinaivu_box.legs import wire as leg_wire
from pinaivu_box.legs.codec import to_job
from pinaivu_box.log import evidence
from pinaivu_box.membership import joining, records, tickets
from pinaivu_box.membership.records import Invalid, Record
from pinaivu_box.models.catalog import remote
from pinaivu_box.receipts.receipt import Proof, canonical
from pinaivu_box.transport import link, wire
from pinaivu_box.witness import rules
from pinaivu_box.witness import wire as log_wire
from pinaivu_box.witness.rules import Rejected
from tests.support import ledger_entries
from tests.support.keys import IDENTITIES
from tests.support.records import advert as made_advert
from tests.support.records import certificate, gone, revocation
from tests.support.written_log import WrittenLog

FEW = 1000  # mutations of each frame
SEED = 20261125
DIGEST = "ab" * 32
TASK = leg_wire.Task(
    "req_" + "0" * 26, "fake:1", [{"role": "user", "content": "Hello"}],
    SamplingDefaults(0.5), 7, 20, ["."], DIGEST, read=[1, 2, 3],
    settled=Sampling(0.5, 0.95, 40, 0.05, 7),
)  # fmt: skip
ENTRY = ledger_entries.entry(IDENTITIES[0], IDENTITIES[1])
WIRE_ENTRY = ledger_wire.SignedEntry(
    IDENTITIES[0].node_id,
    1,
    ENTRY.proof,
    ENTRY.signature,
    ENTRY.acceptance,
    "req_1",
    0,
    0,
    "credits",
)
ITEM = EntrySummary(IDENTITIES[0].node_id, "req_1", 0, 0, "credits", 1, bytes(32))
RECORDS = (
    certificate(IDENTITIES[0], IDENTITIES[1]), revocation(IDENTITIES[0], IDENTITIES[1]),
    made_advert(IDENTITIES[0], 1)[1], gone(IDENTITIES[0], IDENTITIES[1], 1)[1],
)  # fmt: skip


def decoded(decoder: Any) -> Callable[[bytes], Any]:
    return lambda data: wire.decode(data, decoder)


def record(data: bytes) -> Any:
    """A record as gossip and joining have it, and what is in it."""
    found = msgspec.msgpack.decode(data, type=Record)
    if found.kind in ("member", "revocation"):
        return records.read(found)
    return adverts.read(found)


def task(data: bytes) -> Any:
    """And the job that it becomes, with what the proof says of it."""
    asked = wire.decode(data, leg_wire.to_serving)
    if isinstance(asked, leg_wire.LegRequest | leg_wire.Count):
        return to_job(asked.task, remote("fake:1", DIGEST), "peer")
    return asked


def proof(data: bytes) -> Any:
    return canonical(msgspec.json.decode(data, type=Proof))


def signed_note(data: bytes) -> Any:
    """A checkpoint as it is submitted to a witness."""
    try:
        return rules.head_of(rules.read_submission(data.decode()).note)
    except (Rejected, UnicodeDecodeError) as error:
        raise ProtocolError(str(error)) from None


WRITTEN = WrittenLog(IDENTITIES[0].signing_key).grow(8)
FORK = evidence.Fork((WRITTEN.note(3), WRITTEN.note(8)), ("A" * 43 + "=",))
OUT = leg_wire.Out(
    "a", [97], "stop", 1.0, 2, 0, [TokenLogprob(b"a", -1.0, [(b"b", -2.0)])], "x", [b""]
)
# Who reads it, and what honest boxes say there.
READERS: dict[str, tuple[Callable[[bytes], Any], list[Struct | bytes]]] = {
    "hello": (wire.decode_hello, [wire.Hello((1, 2), "1.0", 1.5)]),
    "open": (wire.decode_open, [wire.Open("work"), wire.Open("x" * 32, 9)]),
    "refusal": (decoded(link._refusals), [wire.Refusal(426, "no")]),
    "join": (decoded(joining._join_requests), [joining.JoinRequest(bytes(16), "box")]),
    "welcome": (decoded(joining._welcomes), [joining.Welcome(RECORDS[:2])]),
    "gossip": (
        frames.decode,
        [
            frames.HaveRecords(bytes(32), bytes(16)), frames.WantRecords(bytes(16), bytes(8)),
            frames.GiveRecords(tuple(frames.GivenRecord(one, 5) for one in RECORDS)),
            frames.RosterDigest(bytes(16)), frames.BucketHashes(bytes(512), True),
        ],
    ),
    "records": (record, list(RECORDS)),
    "tasks": (
        task,
        [
            leg_wire.LegRequest(TASK, DIGEST, [1, 2], ("1", "0.5", "2"), "credits"),
            leg_wire.Count(TASK, DIGEST), leg_wire.StopLeg(),
            leg_wire.Accepted("ab" * 64), leg_wire.Disputed("no"),
        ],
    ),
    "answers": (
        decoded(leg_wire.to_coordinator),
        [
            leg_wire.LegRefused("x", "no"), leg_wire.PromptRead([1, 2, 3]),
            leg_wire.Outputs([OUT], "ab" * 64),
            leg_wire.LegStarted(
                DIGEST, "b", "cpu", Sampling(0.8, 0.95, 40, 0.05, 7), "tags", False, DIGEST
            ),
            leg_wire.Alive(), leg_wire.LegProof("{}", "ab" * 64), leg_wire.Tokens([1]),
        ],
    ),
    "ledger": (
        decoded(ledger_wire.decoder),
        [
            ledger_wire.Begin(1, bytes(32)), ledger_wire.Look(1),
            ledger_wire.LedgerDigest(1, b"{}"),
            ledger_wire.AskRanges([b"a"]), ledger_wire.GiveEntries([bytes(32)]), ledger_wire.Done(),
            ledger_wire.Entries([WIRE_ENTRY]), ledger_wire.TakeEntries([WIRE_ENTRY]),
            ledger_wire.RangeHashes([EntryRange([ITEM])]),
            ledger_wire.EntriesTaken({bytes(32): "no"}),
            ledger_wire.Propose(b"{}", bytes(64)), ledger_wire.Reject("no"),
        ],
    ),
    "questions": (
        decoded(file_wire.questions),
        [file_wire.Find("a", ""), file_wire.List(DIGEST), file_wire.GivePiece(DIGEST, 1)],
    ),
    "files": (
        decoded(file_wire.answers),
        [
            file_wire.ModelAvailable("a", DIGEST, 1), file_wire.Hashes(bytes(32)),
            file_wire.PieceData(b"a"),
        ],
    ),
    "log questions": (
        decoded(log_wire.questions),
        [
            log_wire.Submit(1, (bytes(32),), "a\n", b"{}"),
            log_wire.AskConsistency("a", 1, 2), log_wire.AskKnown(IDENTITIES[0].node_id),
            log_wire.Compare(("a\n",), ("ab",)), log_wire.GiveEvidence((b"{}",)),
        ],
    ),
    "log answers": (
        decoded(log_wire.answers),
        [
            log_wire.Cosigned("a\n"), log_wire.SizeConflict(1, "a\n"),
            log_wire.Declined(404, "no", b"{}"), log_wire.Consistency(bytes(32), (bytes(32),)),
            log_wire.Known(("a\n",)), log_wire.Compared(("a\n",), (b"{}",), ("ab",)),
            log_wire.Thanks(),
        ],
    ),
    "notes": (signed_note, [log.submission(3).encode() for log in (WRITTEN,)]),
    "evidence": (lambda data: evidence.verify(data), [FORK.document]),
    "proofs": (proof, [ENTRY.proof]),
}  # fmt: skip
HEADS = b"\xc0\xc1\xc2\xc6\xca\xcb\xcf\xd3\xd9\xdb\xdc\xdd\xdf\xff"
DEEP = 200_000
HUGE: list[bytes] = [
    b"", b"\xc1", b"\x00", b"\xff" * 5,
    b"\x91" * DEEP, b"\x81\xa1a" * DEEP, b"\x81\xa4type" * DEEP, b"[" * DEEP, b'{"a":' * DEEP,
    *(head + b"\xff\xff\xff\xff" for head in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")),
    *(head + b"\xff\xff\xff\xff" + bytes(1000) for head in (b"\xdd", b"\xdf", b"\xdb", b"\xc6")),
    b"\xdc\xff\xff" + b"\x90" * 65535, b"\xc7\xff\x05" + bytes(255),
    b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7), b"\xcb\x7f\xf8" + bytes(6),
]  # fmt: skip


def changed(data: bytes, random: Random) -> bytes:
    """Something is cut off, flipped, doubled, lengthened, or from elsewhere."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(found) + 1)
        match random.randrange(7):
            case 0:
                del found[at:]
            case 1:
                found[at:at] = random.randbytes(random.randrange(1, 9))
            case 2 if at < len(found):
                found[at] ^= 1 << random.randrange(8)
            case 3 if at < len(found):
                found[at] = random.choice(
                    b"\xc0\xc1\xc2\xc6\xca\xcb\xcf\xd3\xd9\xdb\xdc\xdd\xdf\xff"
                )
            case 4:
                found[at:at] = found[random.randrange(len(found) + 1) :]
            case 5:
                found[at : at + 4] = b"\xff\xff\xff\xff"
            case _:
                found[at:at] = random.choice(HUGE)[:64]
        del found[100_000:]
    return bytes(found)


def fuzz(said: Struct | bytes, random: Random) -> Iterator[bytes]:
    data = said if isinstance(said, bytes) else msgspec.msgpack.encode(said)
    yield from (data[:length] for length in range(len(data)))
    yield from (changed(data, random) for _ in range(FEW))


@pytest.mark.parametrize("name", READERS)
def test_damaged_messages_are_read_or_refused_harmlessly(name: str) -> None:
    read, said = READERS[name]
    random = Random(SEED)
    for one in said:
        read(one if isinstance(one, bytes) else msgspec.msgpack.encode(one))  # or it tests nothing
        for data in fuzz(one, random):
            harmless(read, data)
    for data in (*HUGE, *(random.randbytes(random.randrange(200)) for _ in range(FEW))):
        harmless(read, data)


def harmless(read: Callable[[bytes], Any], data: bytes) -> None:
    try:
        read(data)
    except (ProtocolError, Invalid, InvalidBody) as error:
        assert len(str(error)) < 500, data[:50]
    except (ValueError, RecursionError) as error:
        # Records and proofs are read inside what refuses both of these.
        assert read in (record, proof), (error, data[:50])


def test_damaged_tickets_are_read_or_refused_harmlessly() -> None:
    random = Random(SEED)
    text, _ = tickets.invite(
        IDENTITIES[0].node_id, "net_" + "00" * 36, ["192.0.2.1:4002"], now=0, seconds=60
    )
    letters = string.ascii_letters + string.digits + " \n-_=\0\N{SNOWMAN}"
    for _ in range(2000):
        at, more = random.randrange(len(text)), random.randrange(4)
        tried = text[:at] + "".join(random.choices(letters, k=more)) + text[at + more % 2 :]
        try:
            assert tickets.decode(tried) == tickets.decode(text)
        except tickets.TicketInvalid as error:
            assert str(error).isprintable() and len(str(error)) < 300
