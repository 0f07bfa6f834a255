"""`/v1/log`: the log of receipts, as C2SP tlog-tiles has it, with proofs beside the tiles."""

from __future__ import annotations

from msgspec import Struct
from starlette.requests import Request

from pinaivu_box.errors import InternalError, InvalidBody, InvalidValue, NotFound, ReceiptNotFound
from pinaivu_box.log import checkpoint, entry_proof, tiles
from pinaivu_box.log.restart import SignedRestart
from pinaivu_box.server.context import box_of
from pinaivu_box.server.plain import Octets, PlainText
from pinaivu_box.server.receipts import receipt_of
from pinaivu_box.store.log import Log, LogDamaged, StoredCheckpoint
from pinaivu_box.text import number

# Not tiles either: after a restart another log has tiles at the same addresses.
_NOT_CACHED = {"cache-control": "no-cache"}


class LogHistory(Struct, frozen=True):
    """One history of the log: `size` entries, of which `checkpoint`, a signed note, is the last
    that was signed (null before the first).  `restart` is what the box has signed about the history
    before, null if it knows of none."""

    origin: str
    vkey: str
    size: int
    checkpoint: str | None
    restart: SignedRestart | None


class LogView(Struct, frozen=True):
    """The history that goes on, and `earlier` ones, the oldest first."""

    origin: str
    vkey: str
    size: int
    checkpoint: str | None
    restart: SignedRestart | None
    earlier: list[LogHistory]
    object: str = "log"
    request_id: str = ""


class ConsistencyQuery(Struct, frozen=True, rename={"old": "from", "new": "to"}):
    """Numbers of entries."""

    old: str = ""
    new: str = ""


async def get_log(request: Request) -> LogView:
    service = box_of(request).receipt_log
    await service.checkpoint()
    *earlier, current = [
        _history(each, await service.latest(each)) for each in service.histories.all
    ]
    return LogView(
        current.origin, current.vkey, current.size, current.checkpoint, current.restart, earlier
    )


async def get_checkpoint(request: Request) -> PlainText:
    signed = await box_of(request).receipt_log.checkpoint()
    return PlainText(str(signed), headers=_NOT_CACHED)


async def get_proof(request: Request, request_id: str) -> PlainText:
    """Raises ReceiptNotFound, InternalError."""
    await receipt_of(request, request_id)
    try:
        proof = await box_of(request).receipt_log.entry_proof(request_id)
    except LogDamaged as error:
        raise _damaged(error) from None
    if proof is None:
        raise ReceiptNotFound(
            f"The receipt of {request_id} is not in the log: 'pinaivu receipts verify --all' says "
            "why."
        )
    return PlainText(str(proof), headers=_NOT_CACHED)


async def get_consistency(request: Request, query: ConsistencyQuery) -> PlainText:
    """Raises InvalidBody, InternalError."""
    old, new = _size("from", query.old), _size("to", query.new)
    try:
        hashes = await box_of(request).receipt_log.consistency(old, new)
    except InvalidValue as error:
        raise InvalidBody(error.message, loc=("query", error.field)) from None
    except LogDamaged as error:
        raise _damaged(error) from None
    return PlainText(entry_proof.hash_lines(hashes), headers=_NOT_CACHED)


async def get_tile(request: Request, tile: str) -> Octets:
    """Raises NotFound, InternalError."""
    path = tiles.read_path(tile)
    try:
        data = await box_of(request).receipt_log.tile(path) if path is not None else None
    except LogDamaged as error:
        raise _damaged(error) from None
    if data is None:
        raise NotFound(
            "The log has no such tile: GET /v1/log/checkpoint says how many entries it has, and "
            "docs/log.md what the tiles are called."
        )
    return Octets(data, headers=_NOT_CACHED)


def _damaged(error: LogDamaged) -> InternalError:
    return InternalError(f"The log was changed behind the box's back: {error.message}.")


def _history(of: Log, latest: StoredCheckpoint | None) -> LogHistory:
    said = None
    if of.restart is not None and of.signature is not None:
        said = SignedRestart(of.restart.decode(), of.signature.hex())
    size, text = (latest.size, latest.note) if latest is not None else (0, None)
    return LogHistory(of.origin, checkpoint.log_key(of.origin).text, size, text, said)


def _size(name: str, text: str) -> int:
    found = number(text)
    if found is None:
        raise InvalidBody("must be a number of entries", loc=("query", name))
    return found
