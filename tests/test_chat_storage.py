"""Chats in the database: changes at the same time, and no more than an account has room for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from pinaivu_box.chats import conversations, exports
from pinaivu_box.chats.conversations import Chats, new_id
from pinaivu_box.chats.memories import Memories
from pinaivu_box.chats.sealing import RowSealer, new_data_key
from pinaivu_box.chats.settings import change_settings, settings_of
from pinaivu_box.errors import RowConflict, RowNotFound
from pinaivu_box.home import database_of, prepare_home
from pinaivu_box.openai.conversations import (
    Conversation,
    Message,
    Portable,
    PortableConversation,
    PortableMessage,
)
from pinaivu_box.store.accounts import OWNER
from pinaivu_box.store.database import Database

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with database_of(prepare_home(tmp_path)) as opened:
        yield opened


@pytest.fixture
def sealer() -> RowSealer:
    return RowSealer(OWNER, new_data_key())


@pytest.fixture
def chats(database: Database, sealer: RowSealer) -> Chats:
    return Chats(database, sealer)


def message(content: str = "x") -> Message:
    return Message(new_id("msg"), None, "user", 1, content)


async def test_of_changes_at_the_same_time_none_is_lost(chats: Chats) -> None:
    made = await chats.create("", "m:1", "", memory=True)

    def adding(letter: str) -> asyncio.Future[object]:
        def change(now: Conversation) -> Conversation:
            return msgspec.structs.replace(now, title=now.title + letter)

        return asyncio.ensure_future(chats.change(made.id, change, [message(letter)]))

    await asyncio.gather(*map(adding, "abcdefghijkl"))
    assert sorted((await chats.get(made.id)).title) == list("abcdefghijkl")
    assert sorted(one.content for one in await chats.messages(made.id)) == list("abcdefghijkl")


async def test_a_conversation_that_is_deleted_meanwhile_leaves_no_message(chats: Chats) -> None:
    made = await chats.create("", "m:1", "", memory=True)

    def touched(now: Conversation) -> Conversation:
        return msgspec.structs.replace(now, updated_at=now.updated_at + 1)

    changes = [chats.change(made.id, touched, [message()]) for _ in range(8)]
    await asyncio.gather(*changes, chats.delete(made.id), return_exceptions=True)
    assert await chats.messages(made.id) == []
    with pytest.raises(RowNotFound):
        await chats.change(made.id, touched, [message()])
    assert await chats.messages(made.id) == []


async def test_of_settings_that_change_at_the_same_time_none_is_lost(
    database: Database, sealer: RowSealer
) -> None:
    await asyncio.gather(
        change_settings(database, sealer, memories=False),
        change_settings(database, sealer, recovery_key_offered=True),
    )
    settings = await settings_of(database, sealer)
    assert (settings.memories, settings.recovery_key_offered) == (False, True)
    assert not await Memories(database, sealer).enabled()


def exported(count: int, content: str) -> Portable:
    messages = [PortableMessage("a", "user", content)]
    return Portable("pinaivu-chats", 1, [PortableConversation("t", messages)] * count)


@pytest.mark.parametrize(
    ("name", "limit", "fits", "too_much"),
    [
        ("MAX_BYTES", 10_000, exported(2, "x" * 4_000), exported(3, "x" * 4_000)),
        ("MAX_BYTES", 10_000, exported(1, "x" * 9_000), exported(1, "x" * 11_000)),
        ("MAX_CONVERSATIONS", 3, exported(3, "x"), exported(4, "x")),
    ],
)
async def test_an_import_that_does_not_fit_stores_nothing(
    chats: Chats,
    database: Database,
    sealer: RowSealer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    limit: int,
    fits: Portable,
    too_much: Portable,
) -> None:
    monkeypatch.setattr(conversations, name, limit)
    memories = Memories(database, sealer)
    with pytest.raises(RowConflict, match="export and delete"):
        await exports.import_all(chats, memories, too_much)
    assert (await chats.page("", 10)).data == []
    done = await exports.import_all(chats, memories, fits)
    assert done.conversations == len((await chats.page("", 10)).data) == len(fits.conversations)
    with pytest.raises(RowConflict, match="export and delete"):
        await exports.import_all(chats, memories, fits)


async def test_a_conversation_that_is_made_meanwhile_counts(
    chats: Chats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "MAX_CONVERSATIONS", 3)
    made = [chats.create(str(number), "", "", memory=True) for number in range(8)]
    results = await asyncio.gather(*made, return_exceptions=True)
    assert sum(isinstance(result, RowConflict) for result in results) == 5
