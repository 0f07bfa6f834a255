"""`/v1/witness`: this box as a witness of other logs (C2SP tlog-witness).  Nobody needs a key: what
counts is the log's signature.  Answers and their types are those of that specification."""

from __future__ import annotations

import base64
import binascii
import time

from starlette.requests import Request

from pinaivu_box.bounded import BoundedDict
from pinaivu_box.errors import BodyTooLarge
from pinaivu_box.gossip.adverts import TokenBucket
from pinaivu_box.server.bodies import read
from pinaivu_box.server.context import box_of
from pinaivu_box.server.plain import PlainText
from pinaivu_box.server.sessions import address_of
from pinaivu_box.witness.http import FORMER_HEADER, STATEMENT_HEADER
from pinaivu_box.witness.rules import MAX_BODY_BYTES, SIZE_TYPE, Rejected, read_submission
from pinaivu_box.witness.wire import MAX_STATEMENT_BYTES
from pinaivu_box.witness.witness import NoStatement

# Checkpoints that are looked at: of one address, and of all.
_ADDRESS_BURST, _ADDRESS_PER_SECOND = 60.0, 5.0
_BURST, _PER_SECOND = 300.0, 50.0
_MAX_ADDRESSES = 4096
_limit = TokenBucket(_BURST)
_limits: BoundedDict[str, TokenBucket] = BoundedDict(_MAX_ADDRESSES)


async def add_checkpoint(request: Request) -> PlainText:
    """Cosign a checkpoint that is consistent with the last one that was cosigned."""
    if not _may_ask(address_of(request)):
        return _refused(429, "This witness is asked too often: ask again.", {"Retry-After": "1"})
    try:
        submission = read_submission(await _text(request))
        witness = box_of(request).witnessing.witness
        cosignature = await witness.add_checkpoint(submission, _statement(request))
    except BodyTooLarge as error:
        return _refused(413, error.message)
    except NoStatement as rejected:
        former = base64.b64encode(rejected.former.encode()).decode()
        return _refused(rejected.status, rejected.why, {FORMER_HEADER: former})
    except Rejected as rejected:
        if rejected.status == 409:
            return PlainText(f"{rejected.size}\n", 409, {"content-type": SIZE_TYPE})
        return _refused(rejected.status, rejected.why)
    return PlainText(cosignature.line)


async def get_checkpoint(request: Request, origin_hash: str) -> PlainText:
    """The last checkpoint of a log that this witness cosigned, with both signatures."""
    last = box_of(request).witnessing.witness.named(origin_hash)
    if last is not None:
        return PlainText(last.note)
    return _refused(404, "This witness has cosigned no checkpoint of that log.")


def _may_ask(address: str) -> bool:
    now, limit = time.monotonic(), _limits.get(address)
    if limit is None:
        limit = _limits[address] = TokenBucket(_ADDRESS_BURST)
    return limit.take(_ADDRESS_PER_SECOND, now) and _limit.take(_PER_SECOND, now)


async def _text(request: Request) -> str:
    """Raises BodyTooLarge, Rejected."""
    data = await read(request, MAX_BODY_BYTES)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Rejected(400, "The body is not UTF-8.") from None


def _statement(request: Request) -> bytes:
    """With which a log says that it follows another one of its box."""
    encoded = request.headers.get(STATEMENT_HEADER, "")
    if len(encoded) > 2 * MAX_STATEMENT_BYTES:
        return b""
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _refused(status: int, why: str, headers: dict[str, str] | None = None) -> PlainText:
    return PlainText(f"{why}\n", status, headers)
