"""Conversations as files: JSON and Markdown, both of which an import takes again."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import msgspec

from pinaivu_box.chats.conversations import (
    MAX_MESSAGES,
    Chats,
    branch,
    new_id,
    stored_size,
    title_from,
)
from pinaivu_box.chats.memories import Memories
from pinaivu_box.errors import InvalidBody
from pinaivu_box.openai import chat_markdown
from pinaivu_box.openai.conversations import (
    Conversation,
    Imported,
    Message,
    Portable,
    PortableConversation,
    PortableMemory,
    PortableMessage,
    TextFile,
)
from pinaivu_box.openai.memories import Memory
from pinaivu_box.store.conversations import ChatSizes
from pinaivu_box.store.times import now_ms
from pinaivu_box.text import encodable

_MOST_AT_ONCE = 200  # messages in one transaction


class _Tree(NamedTuple):
    """The messages of a file's conversation as they will be stored, each after its parent, and the
    id of the last one of the branch that is shown."""

    messages: list[Message]
    leaf: str | None


def portable(conversation: Conversation, messages: list[Message]) -> PortableConversation:
    return PortableConversation(
        title=conversation.title,
        messages=[
            PortableMessage(
                **{name: getattr(message, name) for name in PortableMessage.__struct_fields__}
            )
            for message in messages
        ],
        model=conversation.model,
        system=conversation.system,
        memory=conversation.memory,
        leaf=conversation.leaf,
        created_at=conversation.created_at,
        updated_at=conversation.updated_at,
    )


def portable_memories(memories: list[Memory]) -> list[PortableMemory]:
    return [PortableMemory(memory.text, memory.created_at) for memory in memories]


def markdown(conversation: Conversation, messages: list[Message]) -> str:
    """The branch that is shown."""
    return chat_markdown.written(conversation, branch(messages, conversation.leaf))


async def import_all(chats: Chats, memories: Memories, file: Portable) -> Imported:
    """Add what the file has, with ids of its own; nothing is replaced.

    Raises, before anything is stored, InvalidBody if messages are no tree, and RowConflict if the
    account has no room for all of them.
    """
    trees = [
        _tree(conversation, _checked(conversation, number))
        for number, conversation in enumerate(file.conversations)
    ]
    sizes = await asyncio.to_thread(lambda: [stored_size(tree.messages) for tree in trees])
    await chats.check_room(ChatSizes(len(trees), sum(sizes)))
    for conversation, tree, size in zip(file.conversations, trees, sizes, strict=True):
        await _import(chats, conversation, tree, size)
        await asyncio.sleep(0)  # others have their turn
    count = sum(len(tree.messages) for tree in trees)
    texts = [(encodable(memory.text), _past(memory.created_at)) for memory in file.memories]
    added = await memories.add_all(texts, "imported") if texts else []
    return Imported(len(trees), count, sum(new for _, new in added))


def _checked(conversation: PortableConversation, number: int) -> list[PortableMessage]:
    """The messages, each after its parent.  Raises InvalidBody."""
    where = ("body", "conversations", number, "messages")
    messages = conversation.messages
    if len(messages) > MAX_MESSAGES:
        raise InvalidBody(f"it has more than {MAX_MESSAGES} messages", loc=where)
    by_id = {message.id: message for message in messages}
    if len(by_id) != len(messages):
        raise InvalidBody("two messages have the same id", loc=where)
    children: dict[str | None, list[PortableMessage]] = {}
    for message in messages:
        if message.parent is not None and message.parent not in by_id:
            raise InvalidBody("a message's parent is not in the conversation", loc=where)
        children.setdefault(message.parent, []).append(message)
    if conversation.leaf is not None and conversation.leaf not in by_id:
        raise InvalidBody("its leaf is not one of its messages", loc=where)
    ordered = list(children.get(None, ()))
    for message in ordered:  # it grows
        ordered += children.get(message.id, ())
    if len(ordered) != len(messages):
        raise InvalidBody("messages are each other's parents", loc=where)
    return ordered


def _tree(conversation: PortableConversation, ordered: list[PortableMessage]) -> _Tree:
    ids = {message.id: new_id("msg") for message in ordered}
    leaf = conversation.leaf or (ordered[-1].id if ordered else None)
    return _Tree([_message(message, ids) for message in ordered], ids[leaf] if leaf else None)


async def _import(chats: Chats, conversation: PortableConversation, tree: _Tree, size: int) -> None:
    messages, leaf = tree
    first = next((message.content for message in messages if message.role == "user"), "")
    created = await chats.create(
        encodable(conversation.title) or title_from(first),
        encodable(conversation.model),
        encodable(conversation.system),
        memory=conversation.memory,
        at=_past(conversation.created_at),
        size=size,
    )
    for begin in range(0, len(messages), _MOST_AT_ONCE):
        await chats.store(messages[begin : begin + _MOST_AT_ONCE], created.id)
    await chats.change(
        created.id,
        lambda stored: msgspec.structs.replace(
            stored, leaf=leaf, updated_at=_past(conversation.updated_at)
        ),
    )


def _message(message: PortableMessage, ids: dict[str, str]) -> Message:
    fields: dict[str, Any] = {
        name: encodable(value) if isinstance(value, str) else value
        for name, value in msgspec.structs.asdict(message).items()
    }
    fields |= {
        "id": ids[message.id],
        "parent": None if message.parent is None else ids[message.parent],
        "created_at": _past(message.created_at),
        "files": [TextFile(encodable(file.name), encodable(file.text)) for file in message.files],
        "status": "interrupted" if message.status == "running" else message.status,
    }
    return Message(**fields)


def _past(at: int) -> int:
    """A time of the file; now, if that is missing or still to come."""
    now = now_ms()
    return at if 0 < at <= now else now
