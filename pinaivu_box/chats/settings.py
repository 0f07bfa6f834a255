"""What an account has settled for its chats, sealed as they are."""

from __future__ import annotations

from typing import Any

import msgspec

from pinaivu_box.chats.sealing import RowSealer
from pinaivu_box.store import memories as rows
from pinaivu_box.store.database import Database


class ChatSettings(msgspec.Struct, array_like=True, frozen=True):
    """`memories`: whether conversations use and add them.  `recovery_key_offered`: whether the
    account has seen the offer of a recovery key, whatever it made of it."""

    memories: bool = True
    recovery_key_offered: bool = False


async def settings_of(database: Database, sealer: RowSealer) -> ChatSettings:
    return _opened(sealer, await rows.settings_of(database, sealer.account_id))


async def change_settings(database: Database, sealer: RowSealer, **changes: Any) -> None:
    """Of two changes at once none is lost.  An account that was removed has none."""
    while True:
        before = await rows.settings_of(database, sealer.account_id)
        after = msgspec.structs.replace(_opened(sealer, before), **changes)
        sealed = sealer.seal(after, "settings", sealer.account_id)
        statement = rows.put_settings(sealer.account_id, sealed, before)
        (stored,) = await database.write(statement)
        if stored or await rows.settings_of(database, sealer.account_id) == before:
            return


def _opened(sealer: RowSealer, sealed: bytes) -> ChatSettings:
    if not sealed:
        return ChatSettings()
    return sealer.open(sealed, ChatSettings, "settings", sealer.account_id)
