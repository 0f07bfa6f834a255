"""Where a receipt is in its box's log, as the explorer shows it."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from pinaivu_box.log import checkpoint, entry_proof
from pinaivu_box.log.note import NoteError
from pinaivu_box.server.explorer_boxes import NamedBox
from pinaivu_box.text import utc_text


class WitnessView(Struct, frozen=True):
    """A box that cosigned the checkpoint, and when."""

    box: NamedBox
    cosigned_at: str


class LogEntryView(Struct, frozen=True):
    """`index` (from 0) among the `size` entries of a checkpoint of the log `origin`.  Whether the
    signatures on it are right is among the receipt's checks."""

    origin: str
    index: int
    size: int
    witnesses: list[WitnessView]


def log_entry(inclusion: str | None, box: Callable[[str], NamedBox]) -> LogEntryView | None:
    """None without a proof of inclusion, and if it or a cosignature is not right: checks say so."""
    if inclusion is None:
        return None
    try:
        proof = entry_proof.read(inclusion)
        signed = checkpoint.read(proof.note)
        named = dict.fromkeys(checkpoint.witnesses_named(proof.note))
        found = [checkpoint.cosignature(proof.note, node_id) for node_id in named]
        witnesses = [WitnessView(box(one.node_id), utc_text(one.time)) for one in found if one]
    except (NoteError, ValueError, OverflowError):
        return None
    return LogEntryView(signed.origin, proof.index, signed.size, witnesses)
