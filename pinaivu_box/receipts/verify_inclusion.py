"""Whether a receipt is in its coordinator's log, and who saw that log: three checks, offline.

The proof of inclusion leads from the receipt to the root of a checkpoint, which the coordinator has
signed; cosignatures on the checkpoint say that witnesses saw it and that it agreed with all that
they had seen of this log before.  Unlike a reader of notes in general, who skips signatures that it
does not know (C2SP signed-note), this one refuses them: in a receipt there are none but the log's
and those of boxes, and what is skipped could be changed unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from msgspec import Struct

from pinaivu_box.identity import NODE_PREFIX
from pinaivu_box.log import checkpoint, entry_proof
from pinaivu_box.log.checkpoint import Checkpoint, Cosignature
from pinaivu_box.log.entry_proof import EntryProof
from pinaivu_box.log.note import Note, NoteError
from pinaivu_box.receipts.checks import VerificationCheck, either
from pinaivu_box.receipts.receipt import Receipt, ReceiptView
from pinaivu_box.text import utc_text

_KEPT = 64  # checkpoints: receipts of about the same time have the same one

_is_signed = lru_cache(_KEPT)(checkpoint.is_signed)


class LogPolicy(Struct, frozen=True):
    """What the verifier asks: with `required` that the receipt is in the log; with `witnesses` (64
    hex digits each, with or without `node_`) also that `quorum` of these have cosigned it: all of
    them if that is None."""

    required: bool = False
    witnesses: tuple[str, ...] = ()
    quorum: int | None = None

    @property
    def node_ids(self) -> list[str]:
        ids = [NODE_PREFIX + key.removeprefix(NODE_PREFIX).lower() for key in self.witnesses]
        return list(dict.fromkeys(ids))


def log_checks(
    view: ReceiptView, receipt: Receipt, policy: LogPolicy
) -> Iterator[VerificationCheck]:
    if view.inclusion is None:
        missing = (
            "it comes without a proof that its box's log has it: the box could have left it out"
        )
        yield VerificationCheck("log", not (policy.required or policy.witnesses), missing)
        return
    try:
        proof = entry_proof.read(view.inclusion)
    except NoteError as error:
        meaning = f"this is not a proof of inclusion: {error}"
        yield VerificationCheck("inclusion", False, meaning)
        return
    signed = checkpoint.read(proof.note)
    yield _inclusion(view, proof, signed)
    yield _checkpoint(receipt, proof.note, signed)
    yield _witnesses(proof.note, signed, policy)


def _inclusion(view: ReceiptView, proof: EntryProof, signed: Checkpoint) -> VerificationCheck:
    entry = entry_proof.entry_of(view.signed_receipt.encode())
    return either(
        "inclusion",
        proof.includes(entry, signed),
        f"it is entry {proof.index} (the first is 0) of the {signed.size} of this checkpoint",
        f"the proof does not lead from this receipt, as entry {proof.index}, to the checkpoint",
    )


def _checkpoint(receipt: Receipt, note: Note, signed: Checkpoint) -> VerificationCheck:
    name, node = "checkpoint signature", receipt.coordinator_id
    if signed.node_id != node:
        meaning = f"the log is that of {signed.node_id}, and not of {node}"
        return VerificationCheck(name, False, meaning)
    return either(
        name,
        _is_signed(note, signed),
        f"{node} signed that its log {signed.origin} had these {signed.size} entries",
        f"the signature is not {node}'s: the checkpoint was altered or forged",
    )


def _witnesses(note: Note, signed: Checkpoint, policy: LogPolicy) -> VerificationCheck:
    try:
        found = _cosignatures(note, signed)
    except NoteError as error:
        return VerificationCheck("witnesses", False, str(error))
    meaning = _told(found)
    if not policy.witnesses:
        return VerificationCheck("witnesses", True, meaning)
    asked = policy.node_ids
    needed = len(asked) if policy.quorum is None else policy.quorum
    present = len({one.node_id for one in found} & set(asked))
    counted = f"{present} of the {len(asked)} that you named, of whom {needed} are needed"
    return VerificationCheck("witnesses", present >= needed, f"{counted}; {meaning}")


@lru_cache(_KEPT)
def _cosignatures(note: Note, signed: Checkpoint) -> tuple[Cosignature, ...]:
    """All of them, in the note's order.  Raises NoteError for a signature that is wrong, or whose
    signer follows from nothing."""
    log_key = checkpoint.log_key(signed.origin)
    others = [each for each in note.signatures if not each.is_by(log_key)]
    named = [node_id for each in others if (node_id := checkpoint.witness_of(each))]
    if len(named) != len(others):
        raise NoteError("one of the signatures is neither the log's nor a witness's")
    if signed.node_id in named:
        raise NoteError(f"{signed.node_id} is no witness of its own log")
    pairs = zip(others, named, strict=True)
    return tuple(checkpoint.read_cosignature(note.text, each, node_id) for each, node_id in pairs)


def _told(found: tuple[Cosignature, ...]) -> str:
    if not found:
        return "no witness cosigned it: nobody but its box says that its log has no other history"
    who = ", ".join(f"{one.node_id} at {utc_text(one.time)}" for one in found)
    count = f"{len(found)} witness{'es' if len(found) > 1 else ''}"
    return f"{count} cosigned it, since it agrees with all that was seen of its log before: {who}"
