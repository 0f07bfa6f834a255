"""`/v1/account/...`: what seals an account's chats, unlocking them, and erasing the account."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.requests import Request

from pinaivu_box.chats import data_keys
from pinaivu_box.chats.sealing import RowSealer
from pinaivu_box.chats.settings import change_settings, settings_of
from pinaivu_box.errors import (
    Conflict,
    InvalidBody,
    Locked,
    Unauthorized,
    Unreadable,
    WrongSecret,
)
from pinaivu_box.gateway.saved_prefixes import delete_all
from pinaivu_box.openai.memories import (
    Confirmed,
    Erase,
    Erased,
    RecoveryKey,
    Seal,
    SealedState,
    StartAnew,
    Unlock,
)
from pinaivu_box.server.context import actor_of, box_of
from pinaivu_box.server.conversations import answers_of
from pinaivu_box.server.json_response import JSON
from pinaivu_box.server.logins import check_throttle, forget_ended
from pinaivu_box.server.sessions import address_of, delete_cookie, require_session
from pinaivu_box.server.unlocked import data_key_of, sealer_of
from pinaivu_box.store import accounts, erasure
from pinaivu_box.store.times import now_ms

_FRESH = 600_000  # milliseconds: a login that is no older stands for the password


async def get_sealed(request: Request) -> SealedState:
    session = require_session(request)
    state = await data_keys.state_of(box_of(request).database, session.account.id)
    data_key = await data_key_of(request)
    offer = False
    if data_key is not None and state.sealed in ("password", "passphrase"):
        sealer = RowSealer(session.account.id, data_key)
        with contextlib.suppress(Unreadable):  # what else is sealed may be readable
            settings = await settings_of(box_of(request).database, sealer)
            offer = not state.recovery_key and not settings.recovery_key_offered
    return SealedState(state.sealed, data_key is not None, state.recovery_key, state.lost, offer)


async def unlock(request: Request, body: Unlock) -> SealedState:
    """Raises RateLimited after too many wrong secrets, WrongSecret."""
    session, box = require_session(request), box_of(request)
    await check_throttle(box, session.account.name, address_of(request))
    box.login_throttle.attempt(session.account.name, address_of(request))
    data_key = await data_keys.unlock(box.database, session.account.id, body.secret)
    if data_key is None:
        raise WrongSecret("That is neither the password, nor the passphrase, nor the recovery key.")
    box.login_throttle.succeeded(session.account.name, address_of(request))
    await box.session_keys.put_of(box.database, session.session.id, data_key)
    return await get_sealed(request)


async def seal(request: Request, body: Seal) -> SealedState:
    """Raises InvalidBody without the secret that is needed, WrongSecret for a wrong one,
    RateLimited, Locked."""
    session, box = require_session(request), box_of(request)
    account = session.account
    if body.sealed == "passphrase" and not body.passphrase:
        raise InvalidBody("a passphrase has at least 8 characters", loc=("body", "passphrase"))
    if body.sealed == "password":
        await _check_password(request, body.password)
    state = await data_keys.state_of(box.database, account.id)
    data_key = await data_key_of(request)
    if state.sealed is not None and data_key is None:
        raise Locked("Unlock your chats first: only then can they be sealed in another way.")
    if state.sealed is not None and body.sealed != "password":
        await _confirm(request, body.secret)
    secret = body.passphrase if body.sealed == "passphrase" else body.password
    data_key = await data_keys.seal(box.database, account.id, body.sealed, secret, data_key)
    if data_key is None:
        raise Conflict("Another session has just done this: reload the page.")
    await box.session_keys.put_of(box.database, session.session.id, data_key)
    if body.sealed != "none" and state.sealed == "none":
        box.database.scrub_later()  # the key that lay there plain
    return await get_sealed(request)


async def create_recovery_key(request: Request, body: Confirmed) -> RecoveryKey:
    """Raises WrongSecret, RateLimited, Locked."""
    session = require_session(request)
    if (data_key := await data_key_of(request)) is None:
        raise Locked("Unlock your chats first: only then can a recovery key be made.")
    await _confirm(request, body.secret)
    database = box_of(request).database
    return RecoveryKey(await data_keys.new_recovery_key(database, session.account.id, data_key))


async def decline_recovery_key(request: Request) -> SealedState:
    """It is not offered again; one can be made at any time.  Raises Locked, SealNotChosen."""
    sealer = await sealer_of(request)
    await change_settings(box_of(request).database, sealer, recovery_key_offered=True)
    return await get_sealed(request)


async def start_anew(request: Request, body: StartAnew) -> SealedState:
    """Delete what nobody can open.  Raises Conflict if it is open, or there is nothing."""
    session, box = require_session(request), box_of(request)
    if await data_key_of(request) is not None:
        raise Conflict("Your chats are unlocked: delete them one by one, or erase the account.")
    state = await data_keys.state_of(box.database, session.account.id)
    if state.sealed is None:
        raise Conflict("Your account has no chats yet: there is nothing to delete.")
    await _stop_all(request)
    await erasure.erase_chats(
        box.database, session.account.id, session.session.id, actor_of(request)
    )
    await forget_ended(box)
    return await get_sealed(request)


async def erase(request: Request, body: Erase) -> JSON[Erased]:
    """Raises WrongSecret for a wrong password, InvalidBody for another name."""
    session, box = require_session(request), box_of(request)
    account = session.account
    if body.name != account.name:
        raise InvalidBody("it is not the name of your account", loc=("body", "name"))
    if account.has_password and body.password:
        await _check_password(request, body.password)
    elif account.has_password or now_ms() - session.session.created_at > _FRESH:
        raise WrongSecret("Send your password, or log in again and erase within 10 minutes.")
    await _stop_all(request)
    error = Unauthorized("The account was erased: its requests were stopped.")
    box.requests.stop_account(account.id, error)
    erased = await erasure.erase(box.database, account, actor_of(request))
    await asyncio.to_thread(delete_all, box.home)
    await forget_ended(box)
    box.requests.stop_account(account.id, error)  # what has begun meanwhile
    response = JSON[Erased](
        Erased(
            account.id,
            erased.conversations,
            erased.memories,
            erased.responses,
            erased.transcripts,
        )
    )
    delete_cookie(request, response)
    return response


async def _stop_all(request: Request) -> None:
    """End the answers in the account's conversations."""
    account = require_session(request).account
    await asyncio.gather(*(one.stop() for one in answers_of(request).of_account(account.id)))


async def _confirm(request: Request, secret: str) -> None:
    """Whoever finds a browser unlocked does not change what opens the chats.  Raises RateLimited,
    WrongSecret."""
    session, box = require_session(request), box_of(request)
    if not secret:
        if now_ms() - session.session.created_at <= _FRESH:
            return
        raise WrongSecret(
            "Send your password, passphrase or recovery key, or log in again and do it within 10 "
            "minutes."
        )
    account = session.account
    await check_throttle(box, account.name, address_of(request))
    box.login_throttle.attempt(account.name, address_of(request))
    named = await accounts.check_password(box.database, account.name, secret)
    if named is None and not await data_keys.opens(box.database, account.id, secret):
        raise WrongSecret("That is neither the password, nor the passphrase, nor the recovery key.")
    box.login_throttle.succeeded(account.name, address_of(request))


async def _check_password(request: Request, password: str) -> None:
    """Raises RateLimited, WrongSecret."""
    account, box = require_session(request).account, box_of(request)
    await check_throttle(box, account.name, address_of(request))
    box.login_throttle.attempt(account.name, address_of(request))
    if await accounts.check_password(box.database, account.name, password) is None:
        raise WrongSecret("That is not the password of your account.")
    box.login_throttle.succeeded(account.name, address_of(request))
