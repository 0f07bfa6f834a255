"""The frames about logs, on a stream with the purpose `log`.

Who opened it asks questions, one at a time, and finishes; each has one answer, or `Declined`.

    Submit(old, proof, note)         Cosigned(signature) or SizeConflict(size, note)
    AskConsistency(origin, old, new) Consistency(root, proof)
    AskKnown(node)                   Known(notes)
    Compare(notes, evidence)         Compared(notes, evidence, wanted)
    GiveEvidence(evidence)           Thanks()

A box that does not know the purpose refuses the stream, and the link stays.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, msgpack

from pinaivu_box.log.evidence import MAX_EVIDENCE_BYTES
from pinaivu_box.log.merkle import HASH_BYTES, MAX_PROOF_HASHES, MAX_SIZE
from pinaivu_box.text import NODE_ID

PURPOSE = "log"
MAX_NOTES = 64  # in a message
MAX_EVIDENCE = 4  # documents in a message
MAX_IDS = 256
MAX_LINK_NOTE_CHARACTERS = 8192  # about forty signatures
MAX_STATEMENT_BYTES = 8192

Size = Annotated[int, Meta(ge=0, le=MAX_SIZE)]
Hash = Annotated[bytes, Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
Proof = Annotated[tuple[Hash, ...], Meta(max_length=MAX_PROOF_HASHES)]
NoteText = Annotated[str, Meta(max_length=MAX_LINK_NOTE_CHARACTERS)]
Notes = Annotated[tuple[NoteText, ...], Meta(max_length=MAX_NOTES)]
Origin = Annotated[str, Meta(max_length=128)]
Ids = Annotated[tuple[Annotated[str, Meta(max_length=32)], ...], Meta(max_length=MAX_IDS)]
Statement = Annotated[bytes, Meta(max_length=MAX_STATEMENT_BYTES)]
Documents = Annotated[
    tuple[Annotated[bytes, Meta(max_length=MAX_EVIDENCE_BYTES)], ...],
    Meta(max_length=MAX_EVIDENCE),
]


class Submit(Struct, frozen=True, tag="Submit"):
    """The sender's own checkpoint, with a consistency proof from the size that it believes the
    other has cosigned last.  `restart` is the statement with which its log began, if it has one."""

    old: Size
    proof: Proof
    note: NoteText
    restart: Statement = b""


class Cosigned(Struct, frozen=True, tag="Cosigned"):
    """The line of the cosignature."""

    signature: Annotated[str, Meta(max_length=512)]


class SizeConflict(Struct, frozen=True, tag="Conflict"):
    """The last checkpoint that was cosigned is another one."""

    size: Size
    note: NoteText = ""


class Declined(Struct, frozen=True, tag="Declined"):
    """`status` as tlog-witness has it, 404 for what the sender does not have; `message` a sentence.
    `restart`: the log that was asked for was given up, with this statement."""

    status: int
    message: Annotated[str, Meta(max_length=500)]
    restart: Statement = b""


class AskConsistency(Struct, frozen=True, tag="AskConsistency"):
    """Asks a log about itself."""

    origin: Origin
    old: Size
    new: Size


class Consistency(Struct, frozen=True, tag="Consistency"):
    """`root` is that of the log's first `old` entries."""

    root: Hash
    proof: Proof


class AskKnown(Struct, frozen=True, tag="AskKnown"):
    """Asks for the last checkpoints of all logs of a box."""

    node: Annotated[str, Meta(pattern=NODE_ID)]


class Known(Struct, frozen=True, tag="Known"):
    notes: Notes


class Compare(Struct, frozen=True, tag="Compare"):
    """The newest checkpoints that the sender has seen, of some logs, and ids of its evidence."""

    notes: Notes = ()
    evidence: Ids = ()


class Compared(Struct, frozen=True, tag="Compared"):
    """Of the same logs those of which the sender has seen another; evidence that the other lacks,
    and ids of what the sender lacks."""

    notes: Notes = ()
    evidence: Documents = ()
    wanted: Ids = ()


class GiveEvidence(Struct, frozen=True, tag="GiveEvidence"):
    evidence: Documents


class Thanks(Struct, frozen=True, tag="Thanks"):
    pass


Question = Submit | AskConsistency | AskKnown | Compare | GiveEvidence
Answer = Cosigned | SizeConflict | Declined | Consistency | Known | Compared | Thanks

questions: msgpack.Decoder[Question] = msgpack.Decoder(Question)
answers: msgpack.Decoder[Answer] = msgpack.Decoder(Answer)
