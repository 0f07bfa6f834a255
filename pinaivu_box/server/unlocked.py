"""The sealed data of whoever asks: only in a session that holds its key."""

from __future__ import annotations

from starlette.requests import Request

from pinaivu_box.chats import data_keys
from pinaivu_box.chats.conversations import Chats
from pinaivu_box.chats.memories import Memories
from pinaivu_box.chats.sealing import RowSealer
from pinaivu_box.errors import Locked, SealNotChosen
from pinaivu_box.server.context import box_of
from pinaivu_box.server.sessions import require_session

_NOT_CHOSEN = (
    "First choose how your chats are kept, sealed or not: on the page /account (POST "
    "/v1/account/sealed)."
)
_LOCKED = (
    "Your chats are locked in this session: unlock them with your password, your passphrase or the "
    "recovery key (POST /v1/account/unlock), or log in again."
)


async def data_key_of(request: Request) -> bytes | None:
    """The session's data key; that of an account that left its chats unsealed needs no secret.
    Raises SessionEnded."""
    session = require_session(request)
    if session.data_key is not None:
        return session.data_key
    box = box_of(request)
    if (kept := box.session_keys.get(session.session.id)) is not None:
        return kept
    key = await data_keys.unsealed(box.database, session.account.id)
    if key is not None:
        await box.session_keys.put_of(box.database, session.session.id, key)
    return key


async def sealer_of(request: Request) -> RowSealer:
    """Raises SessionEnded, Locked, SealNotChosen."""
    session = require_session(request)
    if (data_key := await data_key_of(request)) is None:
        state = await data_keys.state_of(box_of(request).database, session.account.id)
        raise SealNotChosen(_NOT_CHOSEN) if state.sealed is None else Locked(_LOCKED)
    return RowSealer(session.account.id, data_key)


async def chats_of(request: Request) -> Chats:
    """Raises what `sealer_of` does."""
    return Chats(box_of(request).database, await sealer_of(request))


async def memories_of(request: Request) -> Memories:
    """Raises what `sealer_of` does."""
    return Memories(box_of(request).database, await sealer_of(request))
