"""What a box signs when it begins another log: which one it has had, and the last that is known of
it.  So a restart is told apart from a history that was rewritten in silence."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import rfc8785
from msgspec import Meta, Struct

from pinaivu_box import identity as identities
from pinaivu_box.identity import Identity
from pinaivu_box.log import checkpoint, note
from pinaivu_box.log.note import MAX_NOTE_BYTES, NoteError
from pinaivu_box.text import NO_CONTROLS, NODE_ID, SIGNATURE, TIME

DOMAIN = "pinaivu/log-restart/v1"
_Origin = Annotated[str, Meta(max_length=128, pattern=NO_CONTROLS)]


class Restart(Struct, frozen=True, forbid_unknown_fields=True):
    """`origin` is that of the log which begins, at `time` (RFC 3339), for this `reason` (a
    sentence).  `previous_origin` and `last_checkpoint`, a signed note, are None if nothing is known
    of the log before."""

    node_id: Annotated[str, Meta(pattern=NODE_ID)]
    origin: _Origin
    previous_origin: _Origin | None
    last_checkpoint: Annotated[str, Meta(max_length=MAX_NOTE_BYTES)] | None
    time: Annotated[str, Meta(pattern=TIME)]
    reason: Annotated[str, Meta(max_length=1000, pattern=NO_CONTROLS)]
    v: Literal[1] = 1


class SignedRestart(Struct, frozen=True, forbid_unknown_fields=True):
    """`signed` is the text (RFC 8785) that the signature (hex) covers."""

    signed: Annotated[str, Meta(max_length=4 * MAX_NOTE_BYTES)]
    signature: Annotated[str, Meta(pattern=SIGNATURE)]


def sign(identity: Identity, restart: Restart) -> SignedRestart:
    signed = rfc8785.dumps(msgspec.to_builtins(restart))
    return SignedRestart(signed.decode(), identity.sign(DOMAIN, signed).hex())


def read(statement: SignedRestart) -> Restart:
    """The statement, verified: its signature, and the box's own under the checkpoint in it.  Raises
    NoteError."""
    signed = statement.signed.encode(errors="replace")
    try:
        restart = msgspec.json.decode(signed, type=Restart)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise NoteError(f"it is not a statement of a restart: {error}") from None
    if not identities.verify(restart.node_id, DOMAIN, signed, bytes.fromhex(statement.signature)):
        raise NoteError(f"its signature is not that of {restart.node_id}")
    if checkpoint.node_of(restart.origin) != restart.node_id:
        raise NoteError("its origin names another box")
    if restart.previous_origin is not None:
        if checkpoint.node_of(restart.previous_origin) != restart.node_id:
            raise NoteError("its previous origin names another box")
        if checkpoint.epoch_of(restart.previous_origin) >= checkpoint.epoch_of(restart.origin):
            raise NoteError("its origin is not later than the previous one")
    if restart.last_checkpoint is not None:
        _check_last(restart.last_checkpoint, restart.previous_origin)
    return restart


def _check_last(text: str, previous_origin: str | None) -> None:
    signed = note.read(text)
    last = checkpoint.read(signed)
    if last.origin != previous_origin or not checkpoint.is_signed(signed, last):
        raise NoteError("its last checkpoint is not one of the previous log")
