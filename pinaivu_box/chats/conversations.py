"""An account's conversations, opened and sealed with its data key.

Ids, times, and which message follows which are plain; all else is sealed.  A message is bound to
its conversation and its parent: it is refused in any other place.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import msgspec
from ulid import ULID

from pinaivu_box.chats.sealing import RowSealer, sealed_size
from pinaivu_box.errors import RowConflict, RowNotFound, Unreadable
from pinaivu_box.openai.conversations import (
    MAX_TITLE,
    Conversation,
    ConversationList,
    Message,
    Role,
    Status,
    TextFile,
)
from pinaivu_box.store import conversations as rows
from pinaivu_box.store.conversations import ChatSizes, ConversationRow, MessageRow
from pinaivu_box.store.database import Database, SqlStatement
from pinaivu_box.store.times import now_ms
from pinaivu_box.text import number

log = logging.getLogger("pinaivu.chats")
Row = TypeVar("Row")
Content = TypeVar("Content")

MAX_CONVERSATIONS = 20_000  # of an account
MAX_MESSAGES = 5_000  # of a conversation
MAX_CONVERSATION_BYTES = 64_000_000  # of its messages, before another one
MAX_BYTES = 4_000_000_000  # of an account's messages
_MAX_SEARCHED_BYTES = 64_000_000  # by one search
_MAX_SEARCH_SECONDS = 2.0
_ANYTHING = ChatSizes(0, 1)
_DELETED = "There is no such conversation: it may have been deleted."
_SEARCHED, _MAX_READ_BYTES = 50, 16_000_000  # conversations that are read at once


class SealedConversation(msgspec.Struct, array_like=True):
    title: str
    model: str
    system: str
    memory: bool
    leaf: str | None


class SealedMessage(msgspec.Struct, array_like=True, kw_only=True):
    """See `openai.conversations.Message`."""

    role: Role
    content: str
    reasoning: str = ""
    files: list[tuple[str, str]] = []
    images: list[str] = []
    status: Status = "complete"
    error: str = ""
    model: str = ""
    request_id: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_per_second: float | None = None
    memories: list[str] = []
    remembered: list[str] = []


class Changed(NamedTuple):
    """A conversation before a change and after it."""

    before: Conversation
    after: Conversation


def new_id(kind: str) -> str:
    return f"{kind}_{ULID()}".lower()


def readable(found: Iterable[Row], opened: Callable[[Row], Content]) -> list[Content]:
    """The rows that can be opened, as they are then; the others are logged."""
    contents = []
    for row in found:
        try:
            contents.append(opened(row))
        except Unreadable as error:
            log.error("%s", error)
    return contents


class Chats:
    """Those of one account.  Whatever another account has is not found here."""

    def __init__(self, database: Database, sealer: RowSealer) -> None:
        self._database, self._sealer = database, sealer
        self._account = sealer.account_id

    async def create(
        self,
        title: str,
        model: str,
        system: str,
        *,
        memory: bool,
        at: int | None = None,
        size: int = 0,
    ) -> Conversation:
        """`size`: the bytes of the messages that it will have at once.

        Raises RowConflict if there is no room for it, RowNotFound if the account was removed
        meanwhile.
        """
        now = at or now_ms()
        content = SealedConversation(title, model, system, memory, None)
        row = self._row(new_id("conv"), now, now, content)
        room = ChatSizes(MAX_CONVERSATIONS - 1, MAX_BYTES - size)
        (created,) = await self._database.write(rows.insert(row, self._account, room))
        if not created:
            await self.check_room(ChatSizes(1, size))
            raise RowNotFound("The account was removed meanwhile.")
        return _shown(row, content)

    async def check_room(self, more: ChatSizes = _ANYTHING) -> None:
        """Raises RowConflict if that much more cannot be stored for the account."""
        sizes = await rows.sizes(self._database, self._account)
        conversations, total = sizes.conversations + more.conversations, sizes.bytes + more.bytes
        if conversations > MAX_CONVERSATIONS or total > MAX_BYTES:
            raise RowConflict(
                f"The account has {sizes.conversations} conversations with {sizes.bytes} bytes, "
                f"and may have {MAX_CONVERSATIONS} with {MAX_BYTES}: export and delete some."
            )

    async def get(self, conversation_id: str) -> Conversation:
        """Raises RowNotFound."""
        return self._opened(await self._found(conversation_id))

    async def _found(self, conversation_id: str) -> ConversationRow:
        row = await rows.find(self._database, self._account, conversation_id)
        if row is None:
            raise RowNotFound(_DELETED)
        return row

    async def page(self, after: str, limit: int) -> ConversationList:
        """`after` is the `next` of the page before, or "".  Those that cannot be opened are left
        out, so that one of them does not hide the others."""
        found = await rows.page(self._database, self._account, _position(after), limit)
        following = _cursor(found[-1]) if len(found) == limit else None
        return ConversationList(readable(found, self._opened), following)

    async def search(self, text: str, after: str, limit: int) -> ConversationList:
        """Those that have all words of `text` in their title or in a message, newest first.

        It reads a bounded number of bytes for a bounded time; its `next` goes on.
        """
        words = text.casefold().split()
        found: list[Conversation] = []
        position, read, began = after, 0, time.monotonic()
        while read < _MAX_SEARCHED_BYTES and time.monotonic() - began < _MAX_SEARCH_SECONDS:
            page = await rows.page(self._database, self._account, _position(position), _SEARCHED)
            page, size = await self._small_enough(page)
            messages = await rows.messages_of(
                self._database, self._account, [row.id for row in page]
            )
            read += size
            having = await asyncio.to_thread(self._having, messages, words)
            for row in page:
                position = _cursor(row)
                if not (opened := readable([row], self._opened)):
                    continue
                (conversation,) = opened
                if row.id in having or _has_all(conversation.title, words):
                    found.append(conversation)
                    if len(found) == limit:
                        return ConversationList(found, position, searched_all=False)
            if not page:
                return ConversationList(found)
        return ConversationList(found, position, searched_all=False)

    async def _small_enough(self, page: list[ConversationRow]) -> tuple[list[ConversationRow], int]:
        """As many of the first as may be read at once, at least one; and their bytes."""
        sizes = await rows.sizes_of(self._database, [row.id for row in page])
        taken: list[ConversationRow] = []
        total = 0
        for row in page:
            _, size = sizes[row.id]
            if taken and total + size > _MAX_READ_BYTES:
                break
            taken.append(row)
            total += size
        return taken, total

    def _having(self, messages: list[MessageRow], words: list[str]) -> set[str]:
        """The conversations of those messages that have all words."""
        having = set()
        for row in messages:
            try:
                if _has_all(self._opened_message(row).content, words):
                    having.add(row.conversation_id)
            except Unreadable as error:
                log.error("%s", error)
        return having

    async def change(
        self,
        conversation_id: str,
        change: Callable[[Conversation], Conversation],
        messages: Sequence[Message] = (),
    ) -> Changed:
        """Store what `change` makes of a conversation, with new messages, in one transaction.

        If somebody else changes it at the same time, `change` is asked again, about what that has
        become: so no change is lost.  Raises RowNotFound if it was deleted; then nothing is stored.
        """
        while True:
            found = await self._found(conversation_id)
            before = self._opened(found)
            after = change(before)
            content = SealedConversation(
                after.title, after.model, after.system, after.memory, after.leaf
            )
            row = self._row(after.id, after.created_at, after.updated_at, content)
            changed, *_ = await self._database.write(
                rows.update(row, self._account, found.sealed),
                *(self.insertion(message, row.id, row.sealed) for message in messages),
            )
            if changed:
                return Changed(before, _shown(row, content))

    async def delete(self, conversation_id: str) -> None:
        """For good.  Raises RowNotFound."""
        *_, deleted = await self._database.write(*rows.delete(conversation_id, self._account))
        if not deleted:
            raise RowNotFound(_DELETED)

    async def messages(self, conversation_id: str) -> list[Message]:
        """All, oldest first.  See `size` for the memory that they take."""
        found = await rows.messages(self._database, self._account, conversation_id)
        return await self._opened_messages(found)

    async def size(self, conversation_id: str) -> int:
        """The bytes of all messages."""
        _, size = (await rows.sizes_of(self._database, [conversation_id]))[conversation_id]
        return size

    async def branch(self, conversation_id: str, leaf: str) -> list[Message]:
        """That message and those before it, oldest first; empty if there is no such one."""
        found = await rows.branch(self._database, self._account, conversation_id, leaf)
        return branch(await self._opened_messages(found), leaf)

    async def branch_size(self, conversation_id: str, leaf: str) -> int:
        """The bytes of what `branch` reads."""
        return await rows.branch_size(self._database, self._account, conversation_id, leaf)

    async def _opened_messages(self, found: list[MessageRow]) -> list[Message]:
        if sum(len(row.sealed) for row in found) < 200_000:
            return [self._opened_message(row) for row in found]
        return await asyncio.to_thread(lambda: [self._opened_message(row) for row in found])

    async def message(self, conversation_id: str, message_id: str) -> Message:
        """Raises RowNotFound."""
        row = await rows.message(self._database, self._account, conversation_id, message_id)
        if row is None:
            raise RowNotFound("There is no such message in this conversation.")
        return self._opened_message(row)

    async def check_messages(self, conversation_id: str) -> None:
        """Raises RowConflict if the conversation has as many messages as it may."""
        count, size = (await rows.sizes_of(self._database, [conversation_id]))[conversation_id]
        if count + 2 > MAX_MESSAGES or size > MAX_CONVERSATION_BYTES:
            raise RowConflict(
                f"The conversation has {count} messages with {size} bytes, and may have "
                f"{MAX_MESSAGES} with {MAX_CONVERSATION_BYTES}: begin a new one."
            )
        await self.check_room()

    async def store(self, messages: list[Message], conversation_id: str) -> None:
        """Store new messages in one transaction."""
        await self._database.write(
            *(self.insertion(message, conversation_id) for message in messages)
        )

    def insertion(
        self, message: Message, conversation_id: str, conversation: bytes | None = None
    ) -> SqlStatement:
        """The statement that stores a new message; see `insert_message` for `conversation`."""
        sealed = self._sealed(message, conversation_id)
        row = MessageRow(message.id, conversation_id, message.parent, message.created_at, sealed)
        return rows.insert_message(row, self._account, conversation)

    def replacement(self, message: Message, conversation_id: str) -> SqlStatement:
        """The statement that stores it as it is now."""
        sealed = self._sealed(message, conversation_id)
        return rows.update_message(message.id, self._account, sealed)

    def _row(
        self, conversation_id: str, created_at: int, updated_at: int, content: SealedConversation
    ) -> ConversationRow:
        sealed = self._sealer.seal(content, "conversation", conversation_id)
        return ConversationRow(conversation_id, created_at, updated_at, sealed)

    def _opened(self, row: ConversationRow) -> Conversation:
        return _shown(
            row, self._sealer.open(row.sealed, SealedConversation, "conversation", row.id)
        )

    def _sealed(self, message: Message, conversation_id: str) -> bytes:
        ids = (message.id, conversation_id, message.parent or "")
        return self._sealer.seal(_content_of(message), "message", *ids)

    def _opened_message(self, row: MessageRow) -> Message:
        ids = (row.id, row.conversation_id, row.parent_id or "")
        content = self._sealer.open(row.sealed, SealedMessage, "message", *ids)
        fields = msgspec.structs.asdict(content)
        fields["files"] = [TextFile(name, text) for name, text in content.files]
        return Message(id=row.id, parent=row.parent_id, created_at=row.created_at, **fields)


def stored_size(messages: list[Message]) -> int:
    """The bytes that they take in the database."""
    return sum(sealed_size(_content_of(message)) for message in messages)


def _content_of(message: Message) -> SealedMessage:
    fields = {name: getattr(message, name) for name in SealedMessage.__struct_fields__}
    fields["files"] = [(file.name, file.text) for file in message.files]
    return SealedMessage(**fields)


def branch(messages: list[Message], leaf: str | None) -> list[Message]:
    """The messages from the first to `leaf`."""
    by_id = {message.id: message for message in messages}
    path: list[Message] = []
    while leaf is not None and (message := by_id.pop(leaf, None)) is not None:
        path.append(message)
        leaf = message.parent
    return path[::-1]


def title_from(text: str) -> str:
    """What a conversation is called that begins so: its first line, cut at a word."""
    line = next((line.strip().lstrip("#>*`- \t") for line in text.splitlines() if line.strip()), "")
    line = "".join(one for one in line if one.isprintable())
    if len(line) <= 60:
        return line
    head = line[:60]
    return f"{head.rpartition(' ')[0] if ' ' in head[30:] else head}…"


def _shown(row: ConversationRow, content: SealedConversation) -> Conversation:
    return Conversation(
        row.id,
        content.title[:MAX_TITLE],
        content.model,
        content.system,
        content.memory,
        content.leaf,
        row.created_at,
        row.updated_at,
    )


def _cursor(row: ConversationRow) -> str:
    return f"{row.updated_at}.{row.id}"


def _position(cursor: str) -> tuple[int, str] | None:
    if not cursor:
        return None
    at, _, conversation_id = cursor.partition(".")
    if (updated_at := number(at)) is None:
        raise RowConflict("'after' is not the 'next' of a page: leave it out to begin anew.")
    return updated_at, conversation_id


def _has_all(text: str, words: list[str]) -> bool:
    folded = text.casefold()
    return all(word in folded for word in words)
